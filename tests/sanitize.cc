// Runs the kernel under a sanitizer, as XLA calls it: through its handlers, with threads of a pool,
// several calls at a time. XLA itself is not needed: this file makes the call frames, and has the few
// functions of XLA's interface that a handler calls. Arrays end where their memory does.
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <cmath>

#include "norms.h"
#include "xla/ffi/api/c_api.h"

using namespace jaxnorm;

extern "C" XLA_FFI_Error* jaxnorm_forward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* jaxnorm_backward(XLA_FFI_CallFrame*);

struct XLA_FFI_Error {
  std::string message;
};

namespace {

// The pool of threads that XLA lends to a call.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void schedule(XLA_FFI_Task* task, void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back({task, data});
    }
    changed_.notify_one();
  }

  int64_t size() const { return static_cast<int64_t>(threads_.size()); }

 private:
  struct Task {
    XLA_FFI_Task* run;
    void* data;
  };

  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const Task task = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task.run(task.data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool over_ = false;
  std::vector<std::thread> threads_;
};

ThreadPool* pool;

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->message};
}
void get_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  pool->schedule(args->task, args->data);
  return nullptr;
}
XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = pool->size();
  return nullptr;
}

XLA_FFI_Api make_api() {
  XLA_FFI_Api api = {};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_GetMessage = get_message;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = num_threads;
  return api;
}

const XLA_FFI_Api kApi = make_api();

// An array whose memory has exactly its size, so that a step beyond its end is an error.
struct Array {
  Array(XLA_FFI_DataType type, int64_t size)
      : type(type), size(size), data(new char[size * (type == XLA_FFI_DataType_F32 ? 4 : 2)]()) {}
  ~Array() { delete[] data; }
  Array(const Array&) = delete;

  // Numbers from -0.5 to 0.5.
  Array& fill(uint32_t seed) {
    for (int64_t i = 0; i < size; ++i) {
      seed = seed * 1664525 + 1013904223;
      const float value = static_cast<float>(seed >> 8) / (1 << 24) - 0.5f;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (type == XLA_FFI_DataType_F32) {
        std::memcpy(data + 4 * i, &bits, 4);
      } else {
        std::memcpy(data + 2 * i, &half, 2);
      }
    }
    return *this;
  }

  // The sum of float32 numbers: it is finite if they are.
  double sum() const {
    double total = 0;
    for (int64_t i = 0; i < size; ++i) {
      float value;
      std::memcpy(&value, data + 4 * i, 4);
      total += value;
    }
    return total;
  }

  const XLA_FFI_DataType type;
  const int64_t size;
  char* const data;
};

// One call. Attributes have to be added in the order of their names.
class Call {
 public:
  Call& argument(const Array& a) { return add(args_, a); }
  Call& result(const Array& a) { return add(rets_, a); }
  Call& integer(const char* name, int64_t value) {
    return attribute(name, XLA_FFI_DataType_S64, &value, sizeof value);
  }
  Call& number(const char* name, double value) {
    return attribute(name, XLA_FFI_DataType_F64, &value, sizeof value);
  }
  Call& boolean(const char* name, bool value) {
    return attribute(name, XLA_FFI_DataType_PRED, &value, sizeof value);
  }
  Call& block(const Block& b) {
    return integer("g", b.g).integer("k", b.k).integer("n", b.n).integer("s", b.s);
  }

  // The message of the error, or nothing.
  std::string run(XLA_FFI_Handler* handler) {
    std::vector<XLA_FFI_ArgType> arg_types(args_.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> ret_types(rets_.size(), XLA_FFI_RetType_BUFFER);
    std::vector<XLA_FFI_AttrType> attr_types(scalars_.size(), XLA_FFI_AttrType_SCALAR);
    std::vector<void*> args, rets, attrs;
    std::vector<XLA_FFI_ByteSpan*> names;
    for (auto& buffer : args_) args.push_back(&buffer);
    for (auto& buffer : rets_) rets.push_back(&buffer);
    for (auto& scalar : scalars_) attrs.push_back(&scalar);
    for (auto& name : names_) names.push_back(&name);
    XLA_FFI_CallFrame frame = {};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &kApi;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(args.size()),
                  arg_types.data(), args.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(rets.size()),
                  ret_types.data(), rets.data()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr, static_cast<int64_t>(attrs.size()),
                   attr_types.data(), names.data(), attrs.data()};
    XLA_FFI_Error* error = handler(&frame);
    std::string message = error ? error->message : "";
    delete error;
    return message;
  }

 private:
  Call& add(std::deque<XLA_FFI_Buffer>& buffers, const Array& a) {
    sizes_.push_back(a.size);
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, a.type, a.data, 1, &sizes_.back()});
    return *this;
  }

  Call& attribute(const char* name, XLA_FFI_DataType type, const void* value, size_t size) {
    values_.push_back({});
    std::memcpy(values_.back().bytes, value, size);
    scalars_.push_back({type, values_.back().bytes});
    names_.push_back({name, std::strlen(name)});
    return *this;
  }

  struct Value {
    alignas(8) char bytes[8];
  };
  std::deque<XLA_FFI_Buffer> args_, rets_;
  std::deque<int64_t> sizes_;
  std::deque<Value> values_;
  std::deque<XLA_FFI_Scalar> scalars_;
  std::deque<XLA_FFI_ByteSpan> names_;
};

// What a call may have or not.
struct Options {
  bool subtract_mean, scale, bias, gradients, residual;
};

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32;

// Forward and backward of `batch` blocks, each with a scale of its own and all with one bias; what
// went wrong, or nothing.
std::string run(XLA_FFI_DataType type, const Block& b, int64_t batch, const Options& has) {
  const int64_t size = batch * b.n * b.example(), groups = batch * b.groups();
  const int64_t means = has.subtract_mean ? groups : 0;
  const int64_t scales = has.scale ? batch * b.features() : 0, biases = has.bias ? b.features() : 0;
  Array x(type, size), y(type, size), dy(type, size), dx(type, size);
  Array scale(kF32, scales), bias(kF32, biases), high(kF32, means), low(kF32, means);
  Array var(kF32, groups), rstd(kF32, groups);
  const int64_t sums = has.residual ? size : 0;
  Array residual(type, sums), total(type, sums), dtotal(type, sums);
  Array dscale(kF32, has.gradients ? batch * b.features() : 0);
  Array dbias(kF32, has.gradients && has.bias ? batch * b.features() : 0);
  x.fill(1), dy.fill(2), scale.fill(3), bias.fill(4), residual.fill(5), dtotal.fill(6);
  Call forward;
  forward.argument(x).argument(residual).argument(scale).argument(bias);
  forward.result(y).result(total).result(high).result(low).result(var).result(rstd);
  forward.integer("batch", batch).number("epsilon", 1e-6).block(b);
  forward.boolean("subtract_mean", has.subtract_mean);
  std::string error = forward.run(jaxnorm_forward);
  if (!error.empty()) return error;
  Call backward;
  backward.argument(has.residual ? total : x).argument(dy).argument(dtotal).argument(scale);
  backward.argument(high).argument(low).argument(rstd);
  backward.result(dx).result(dscale).result(dbias);
  backward.integer("batch", batch).block(b).boolean("subtract_mean", has.subtract_mean);
  error = backward.run(jaxnorm_backward);
  if (!error.empty()) return error;
  double all_sums = 0;
  for (const Array* a : {&high, &low, &var, &rstd, &dscale, &dbias}) all_sums += a->sum();
  return std::isfinite(all_sums) ? "" : "a result is not a number";
}

const Block kBlocks[] = {
    // rows: layer, rms; with groups; longer than a tile; several tasks; by feature
    {1, 1, 1, 1}, {3, 1, 1, 2}, {5, 1, 1, 7}, {2, 1, 1, 8}, {3, 1, 1, 33}, {4, 1, 1, 1000},
    {3, 1, 2, 5}, {7, 1, 5, 1}, {2, 1, 3, 9}, {3, 1, 1, 2049}, {1, 1, 1, 6147}, {300, 1, 1, 257},
    {129, 1, 3, 171}, {4100, 1, 1, 17}, {9, 1, 1, 2048 * 3 + 1}, {20, 1, 1, 8201},
    {2, 1, 1, 16384}, {2, 1, 1, 16391},
    // columns: batch, group, instance; fewer rows than are folded; rows left over; chunks
    {1, 2, 1, 1}, {1, 7, 1, 1}, {2, 3, 1, 1}, {3, 7, 3, 1}, {2, 5, 1, 7}, {2, 9, 7, 1},
    {1, 64, 8, 1}, {2, 65, 2, 4}, {3, 6, 5, 2}, {1, 1000, 7, 1}, {70, 40, 3, 7}, {1, 66000, 1, 1},
    {1, 4099, 33, 1}, {2, 2049, 3, 11}, {1, 700, 200, 1}, {40, 7, 1000, 1}, {33, 9, 32, 36},
};

bool run_all() {
  bool good = true;
  int large = 0;
  for (const Block& b : kBlocks) {
    for (XLA_FFI_DataType type : {kF32, XLA_FFI_DataType_BF16}) {
      for (int bits = 0; bits < 32; ++bits) {
        const Options has = {(bits & 8) != 0, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0,
                             (bits & 16) != 0};
        if ((!has.subtract_mean || has.residual) && b.s > 1) continue;
        if (has.residual && type != kF32 && b.k > kLongestSum) continue;
        // For large blocks, all of scale, bias and their gradients, and some of the rest.
        const bool is_large = b.n * b.example() > 40000;
        if (is_large && bits % 8 != 7 && large++ % 4) continue;
        const std::string error = run(type, b, is_large ? 1 : 2, has);
        if (!error.empty()) {
          std::printf("%s: block of %ld %ld %ld %ld\n", error.c_str(), (long)b.n, (long)b.s,
                      (long)b.g, (long)b.k);
          good = false;
        }
      }
    }
  }
  return good;
}

// Calls that a handler must refuse, because they do not fit the arrays.
bool refuses(const char* what, const Block& b, int64_t batch, int64_t groups, int64_t scales) {
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
    std::printf("taken: %s\n", what);
    return false;
  }
  return true;
}

bool refuses_all() {
  const int64_t huge = int64_t{1} << 62;
  return refuses("too many examples", {5, 1, 1, 6}, 1, 4, 6) &
         refuses("negative sizes", {-4, 1, 1, -6}, 1, 4, 6) &
         refuses("a product that overflows", {huge, 1, 1, huge}, 1, 4, 6) &
         refuses("a product that overflows to the right size", {4, 1, 1, 6 + huge}, 1, 4, 0) &
         refuses("an empty axis", {4, 1, 1, 0}, 1, 4, 6) &
         refuses("few statistics", {4, 1, 1, 6}, 1, 3, 6) &
         refuses("no statistics", {4, 1, 1, 6}, 1, 0, 6) &
         refuses("a small scale", {4, 1, 1, 6}, 1, 4, 5) &
         refuses("an empty batch", {4, 1, 1, 6}, 0, 4, 6) &
         refuses("a batch that is too large", {4, 1, 1, 6}, 2, 4, 6);
}

}  // namespace

// 77 if the machine can't run what this was compiled for.
int main() {
#if defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  ThreadPool threads(4);
  pool = &threads;
  bool first = false, second = false;
  std::thread other([&] { first = run_all(); });
  second = run_all();
  other.join();
  if (!first || !second || !refuses_all()) return 1;
  std::puts("all calls ran");
}
