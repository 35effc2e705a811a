// Runs the kernel as XLA calls it: through its handlers, with threads of a pool, several calls at a
// time. XLA itself is not needed, so the whole program can be compiled with a sanitizer, or for
// another processor.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "frames.h"
#include "truth.h"

using namespace frames;
using jaxnorm::Block;

// Allocations, one of which may fail on purpose. All functions are replaced, because a
// sanitizer's versions do not call each other.
static void* allocate(size_t size) {
  if (allocations_left > 0 && --allocations_left == 0) return nullptr;
  return std::malloc(size + !size);
}
static void* or_throw(void* memory) { return memory ? memory : throw std::bad_alloc(); }
void* operator new(size_t size) { return or_throw(allocate(size)); }
void* operator new[](size_t size) { return or_throw(allocate(size)); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }

extern "C" XLA_FFI_Error* jaxnorm_forward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jaxnorm_backward(XLA_FFI_CallFrame*);

namespace {

// The optional parts of a call.
struct Options {
  bool subtract_mean, scale, bias, gradients, residual;
};

// Returns a message if a result is NaN, or differs from the truth by more than four units of its type.
std::string compare_with_truth(const char* name, const Array& result, const truth::Result& expected) {
  const double unit = expected.magnitude / (result.type == kF32 ? 1 << 24 : 1 << 9);
  for (int64_t i = 0; i < result.size; ++i) {
    const double error = std::fabs(result.at(i) - expected.value[i]);
    if (!(error <= 4 * unit)) {
      return std::string(name) + " is off by " + std::to_string(error / unit) + " units, ";
    }
  }
  return "";
}

// Runs forward and backward for `batch` blocks, each with its own scale and all with one bias. Returns
// a message if something is wrong, or nothing.
std::string run(XLA_FFI_DataType type, const Block& b, int64_t batch, const Options& has, bool compare) {
  const int64_t size = batch * b.n * b.example(), groups = batch * b.groups();
  const int64_t means = has.subtract_mean ? groups : 0;
  const int64_t scales = has.scale ? batch * b.features() : 0, biases = has.bias ? b.features() : 0;
  Array x(type, size), y(type, size), dy(type, size), dx(type, size);
  Array scale(kF32, scales), bias(kF32, biases), high(kF32, means), low(kF32, means);
  Array var(kF32, groups), rstd(kF32, groups);
  const int64_t sums = has.residual ? size : 0;
  Array residual(type, sums), residual_sum(type, sums), d_residual_sum(type, sums);
  Array dscale(kF32, has.gradients ? batch * b.features() : 0);
  Array dbias(kF32, has.gradients && has.bias ? batch * b.features() : 0);
  x.fill(1), dy.fill(2), scale.fill(3), bias.fill(4), residual.fill(5), d_residual_sum.fill(6);
  constexpr double kEpsilon = 1e-6;
  Call forward;
  forward.argument(x).argument(residual).argument(scale).argument(bias);
  forward.result(y).result(residual_sum).result(high).result(low).result(var).result(rstd);
  forward.integer("batch", batch).number("epsilon", kEpsilon).block(b);
  forward.boolean("subtract_mean", has.subtract_mean);
  std::string error = forward.run(jaxnorm_forward);
  if (!error.empty()) return error;
  const Array& backward_x = has.residual ? residual_sum : x;
  Call backward;
  backward.argument(backward_x).argument(dy).argument(d_residual_sum).argument(scale);
  backward.argument(high).argument(low).argument(rstd);
  backward.result(dx).result(dscale).result(dbias);
  backward.integer("batch", batch).block(b).boolean("subtract_mean", has.subtract_mean);
  error = backward.run(jaxnorm_backward);
  if (!error.empty()) return error;
  double all_sums = 0;
  for (const Array* a : {&high, &low, &var, &rstd, &dscale, &dbias}) all_sums += a->sum();
  if (!std::isfinite(all_sums)) return "a result is not a number";
  if (!compare) return "";
  truth::Vector sum = x.numbers(size, 0);
  for (int64_t i = 0; i < sums; ++i) sum[i] += residual.at(i);
  const truth::Results expected = truth::compute(
      {b, batch, kEpsilon, has.subtract_mean, sum, scale.numbers(batch * b.features(), 1),
       bias.numbers(b.features(), 0), backward_x.numbers(size, 0), dy.numbers(size, 0),
       d_residual_sum.numbers(size, 0)});
  return compare_with_truth("y", y, expected.y) + compare_with_truth("dx", dx, expected.dx) +
         compare_with_truth("dscale", dscale, expected.dscale) +
         compare_with_truth("dbias", dbias, expected.dbias);
}

const Block kBlocks[] = {
    // rows: layer, rms; with groups; longer than a tile; several tasks; by feature
    {1, 1, 1, 1}, {3, 1, 1, 2}, {5, 1, 1, 7}, {2, 1, 1, 8}, {3, 1, 1, 33}, {4, 1, 1, 1000},
    {3, 1, 2, 5}, {7, 1, 5, 1}, {2, 1, 3, 9}, {3, 1, 1, 2049}, {1, 1, 1, 6147}, {300, 1, 1, 257},
    {129, 1, 3, 171}, {4100, 1, 1, 17}, {9, 1, 1, 2048 * 3 + 1}, {20, 1, 1, 8201},
    {2, 1, 1, 16384}, {2, 1, 1, 16391},
    // columns: batch, group, instance; fewer rows than are folded; remaining rows; chunks
    {1, 2, 1, 1}, {1, 7, 1, 1}, {2, 3, 1, 1}, {3, 7, 3, 1}, {2, 5, 1, 7}, {2, 9, 7, 1},
    {1, 64, 8, 1}, {2, 65, 2, 4}, {3, 6, 5, 2}, {1, 1000, 7, 1}, {70, 40, 3, 7}, {1, 66000, 1, 1},
    {1, 4099, 33, 1}, {2, 2049, 3, 11}, {1, 700, 200, 1}, {40, 7, 1000, 1}, {33, 9, 32, 36},
};

bool run_all(bool compare) {
  bool good = true;
  int large = 0;
  for (const Block& b : kBlocks) {
    for (XLA_FFI_DataType type : {kF32, XLA_FFI_DataType_BF16}) {
      for (int bits = 0; bits < 32; ++bits) {
        const Options has = {(bits & 8) != 0, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0,
                             (bits & 16) != 0};
        if ((!has.subtract_mean || has.residual) && b.s > 1) continue;
        if (has.residual && type != kF32 && b.k > jaxnorm::kLongestSum) continue;
        // For large blocks: cases with scale, bias and their gradients, and a quarter of the others.
        const bool is_large = b.n * b.example() > 40000;
        if (is_large && bits % 8 != 7 && large++ % 4) continue;
        const std::string error = run(type, b, is_large ? 1 : 2, has, compare);
        if (!error.empty()) {
          std::printf("%s in a block of %ld %ld %ld %ld\n", error.c_str(), (long)b.n, (long)b.s,
                      (long)b.g, (long)b.k);
          good = false;
        }
      }
    }
  }
  return good;
}

// Returns whether the handlers reject a call whose block does not fit the arrays.
bool rejects(const char* what, const Block& b, int64_t batch, int64_t groups, int64_t scales) {
  Array x(kF32, 24), y(kF32, 24), high(kF32, groups), low(kF32, groups), rstd(kF32, groups);
  Array var(kF32, groups), scale(kF32, scales), none(kF32, 0);
  Call forward, backward;
  forward.argument(x).argument(none).argument(scale).argument(none);
  forward.result(y).result(none).result(high).result(low).result(var).result(rstd);
  forward.integer("batch", batch).number("epsilon", 1e-6).block(b).boolean("subtract_mean", true);
  backward.argument(x).argument(x).argument(none).argument(scale);
  backward.argument(high).argument(low).argument(rstd);
  backward.result(y).result(none).result(none);
  backward.integer("batch", batch).block(b).boolean("subtract_mean", true);
  if (forward.run(jaxnorm_forward).empty() || backward.run(jaxnorm_backward).empty()) {
    std::printf("not rejected: %s\n", what);
    return false;
  }
  return true;
}

bool rejects_all() {
  const int64_t huge = int64_t{1} << 62;
  return rejects("too many examples", {5, 1, 1, 6}, 1, 4, 6) &
         rejects("negative sizes", {-4, 1, 1, -6}, 1, 4, 6) &
         rejects("a product that overflows", {huge, 1, 1, huge}, 1, 4, 6) &
         rejects("a product that overflows to the right size", {4, 1, 1, 6 + huge}, 1, 4, 0) &
         rejects("an empty axis", {4, 1, 1, 0}, 1, 4, 6) &
         rejects("few statistics", {4, 1, 1, 6}, 1, 3, 6) &
         rejects("no statistics", {4, 1, 1, 6}, 1, 0, 6) &
         rejects("a small scale", {4, 1, 1, 6}, 1, 4, 5) &
         rejects("an empty batch", {4, 1, 1, 6}, 0, 4, 6) &
         rejects("a batch that is too large", {4, 1, 1, 6}, 2, 4, 6);
}

// Lets each allocation of a call fail once: the call must then return an error to XLA.
bool survives(const Block& b, int64_t batch) {
  const int64_t size = batch * b.n * b.example(), groups = batch * b.groups();
  Array x(kF32, size), y(kF32, size), scale(kF32, b.features()), none(kF32, 0);
  Array high(kF32, groups), low(kF32, groups), var(kF32, groups), rstd(kF32, groups);
  Array dscale(kF32, batch * b.features());
  Call forward, backward;
  forward.argument(x).argument(none).argument(scale).argument(none);
  forward.result(y).result(none).result(high).result(low).result(var).result(rstd);
  forward.integer("batch", batch).number("epsilon", 1e-6).block(b).boolean("subtract_mean", true);
  backward.argument(x).argument(x).argument(none).argument(scale);
  backward.argument(high).argument(low).argument(rstd);
  backward.result(y).result(dscale).result(none);
  backward.integer("batch", batch).block(b).boolean("subtract_mean", true);
  bool good = true;
  auto each_failure = [&](Call& call, XLA_FFI_Handler* handler) {
    int64_t failing = 0;
    do {
      const std::string error = call.run(handler, ++failing);
      const bool right =
          call.ran_out ? call.code == XLA_FFI_Error_Code_RESOURCE_EXHAUSTED : error.empty();
      if (!right) std::printf("without allocation %ld: \"%s\"\n", (long)failing, error.c_str());
      good = good && right;
    } while (call.ran_out);
    return failing;
  };
  const int64_t failures = each_failure(forward, jaxnorm_forward) + each_failure(backward, jaxnorm_backward);
  return good && failures > 2;  // the last call of each succeeds
}

bool survives_all() {
  // Rows and columns. Threads share a block, or each computes whole blocks.
  return survives({300, 1, 1, 1000}, 1) & survives({2048, 1, 1, 100}, 1) & survives({40, 1, 1, 2048}, 8) &
         survives({1, 4099, 33, 1}, 1) & survives({2, 600, 10, 11}, 8);
}

}  // namespace

// Compares the results with the truth if there is an argument. Returns 77 if the machine lacks the
// instructions that this was compiled for.
int main(int arguments, char**) {
#if defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  ThreadPool threads(4);
  pool = &threads;
  bool first = false, second = false;
  std::thread other([&] { first = run_all(arguments > 1); });
  second = run_all(false);
  other.join();
  if (!first || !second || !rejects_all() || !survives_all()) return 1;
  std::puts("all calls ran");
}
