// Runs every kernel under a sanitizer, without XLA: sizes that fill vectors and that don't, in
// buffers that end where they must, on threads of its own, several calls at a time.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "norms.h"

using namespace jaxnorm;

namespace {

class Threads final : public Pool {
 public:
  void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) override {
    std::atomic<int64_t> next{0};
    auto take = [&] {
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i);
    };
    std::vector<std::thread> threads;
    for (int64_t i = 1; i < tasks && i < 4; ++i) threads.emplace_back(take);
    take();
    for (auto& thread : threads) thread.join();
  }
};

// Exactly as large as asked for, so that a step beyond its end is one into forbidden memory.
template <class T>
struct Array {
  explicit Array(int64_t size) : size(size), data(new T[size]()) {}
  ~Array() { delete[] data; }
  Array(const Array&) = delete;
  const int64_t size;
  T* const data;
};

void fill(void* data, int64_t size, Element element, uint32_t seed) {
  for (int64_t i = 0; i < size; ++i) {
    seed = seed * 1664525 + 1013904223;
    const float value = static_cast<float>(seed >> 8) / (1 << 23) - 0.5f;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (element == Element::kFloat32) {
      std::memcpy(static_cast<char*>(data) + 4 * i, &bits, 4);
    } else {
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      std::memcpy(static_cast<char*>(data) + 2 * i, &half, 2);
    }
  }
}

// Forward and backward; false if a result is no number.
bool run(const Level& level, Element element, const Block& b, bool centred, bool scaled,
         bool biased, bool columns) {
  const int64_t size = b.n * b.example(), width = element == Element::kFloat32 ? 4 : 2;
  Array<char> x(width * size), y(width * size), dy(width * size), dx(width * size);
  Array<float> scale(b.features()), bias(b.features()), dscale(b.features()), dbias(b.features());
  Array<float> mean(b.groups()), rest(b.groups()), var(b.groups()), rstd(b.groups());
  fill(x.data, size, element, 1);
  fill(dy.data, size, element, 2);
  fill(scale.data, b.features(), Element::kFloat32, 3);
  fill(bias.data, b.features(), Element::kFloat32, 4);
  float* const factors = scaled ? scale.data : nullptr;
  float *const means = centred ? mean.data : nullptr, *const rests = centred ? rest.data : nullptr;
  Threads pool;
  level.forward(element,
                {b, 1e-6, centred, x.data, factors, biased ? bias.data : nullptr, y.data,
                 {means, rests, var.data, rstd.data}},
                pool);
  level.backward(element,
                 {b, centred, x.data, dy.data, factors, means, rests, rstd.data, dx.data,
                  columns ? dscale.data : nullptr, columns && biased ? dbias.data : nullptr},
                 pool);
  double total = 0;
  for (const auto* part : {&dscale, &dbias, &mean, &rest, &var, &rstd}) {
    for (int64_t i = 0; i < part->size; ++i) total += part->data[i];
  }
  return std::isfinite(total);
}

const Block kBlocks[] = {
    // rows: layer, rms; with groups; longer than a tile; several tasks; by feature
    {1, 1, 1, 1}, {3, 1, 1, 2}, {5, 1, 1, 7}, {2, 1, 1, 8}, {3, 1, 1, 33}, {4, 1, 1, 1000},
    {3, 1, 2, 5}, {7, 1, 5, 1}, {2, 1, 3, 9}, {3, 1, 1, 2049}, {1, 1, 1, 6147}, {300, 1, 1, 257},
    {129, 1, 3, 171}, {4100, 1, 1, 17}, {9, 1, 1, 2048 * 3 + 1}, {20, 1, 1, 8201},
    // columns: batch, group, instance; fewer rows than are folded; rows left over; chunks
    {1, 2, 1, 1}, {1, 7, 1, 1}, {2, 3, 1, 1}, {3, 7, 3, 1}, {2, 5, 1, 7}, {2, 9, 7, 1},
    {1, 64, 8, 1}, {2, 65, 2, 4}, {3, 6, 5, 2}, {1, 1000, 7, 1}, {70, 40, 3, 7}, {1, 66000, 1, 1},
    {1, 4099, 33, 1}, {2, 2049, 3, 11}, {1, 700, 200, 1}, {40, 7, 1000, 1}, {33, 9, 32, 36},
};

bool run_all(const Level& level) {
  bool good = true;
  int run_number = 0;
  for (const Block& block : kBlocks) {
    for (Element element : {Element::kFloat32, Element::kBfloat16}) {
      for (int bits = 0; bits < 16; ++bits) {
        const bool centred = bits & 8;
        if (!centred && block.s > 1) continue;
        // Of what is large, a few combinations of scale, bias and their gradients.
        if (block.n * block.example() > 40000 && bits % 8 != 7 && run_number++ % 4) continue;
        if (!run(level, element, block, centred, bits & 1, bits & 2, bits & 4)) {
          std::printf("%s: no number in a block of %ld %ld %ld %ld\n", level.name, (long)block.n,
                      (long)block.s, (long)block.g, (long)block.k);
          good = false;
        }
      }
    }
  }
  return good;
}

}  // namespace

// 77 where the machine can't run the level.
int main() {
#if defined(JAXNORM_AVX2)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  bool first = false, second = false;
  std::thread other([&] { first = run_all(JAXNORM_NAME); });
  second = run_all(JAXNORM_NAME);
  other.join();
  if (!first || !second) return 1;
  std::puts("all kernels ran");
}
