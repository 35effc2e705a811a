// Calls of a handler as XLA makes them: call frames, and the functions of XLA's interface that
// handlers use.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "norms.h"
#include "xla/ffi/api/c_api.h"

struct XLA_FFI_Error {
  XLA_FFI_Error_Code code;
  std::string message;
};

namespace frames {

// The pool of threads that XLA passes to a call.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_ = true;
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
      changed_.wait(lock, [this] { return finished_ || !tasks_.empty(); });
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
  bool finished_ = false;
  std::vector<std::thread> threads_;
};

inline ThreadPool* pool;

// Each allocation of any thread decreases this. The one that reaches zero fails (calls.cc).
inline std::atomic<int64_t> allocations_left{0};

inline XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return new XLA_FFI_Error{args->errc, args->message};
}
inline void get_message(XLA_FFI_Error_GetMessage_Args* args) {
  args->message = args->error->message.c_str();
}
inline void destroy_error(XLA_FFI_Error_Destroy_Args* args) { delete args->error; }
inline XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  pool->schedule(args->task, args->data);
  return nullptr;
}
inline XLA_FFI_Error* num_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = pool->size();
  return nullptr;
}

inline XLA_FFI_Api make_api() {
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

inline const XLA_FFI_Api kApi = make_api();

// An array whose memory has exactly its size, so that sanitizers find an access beyond its end.
struct Array {
  Array(XLA_FFI_DataType type, int64_t size)
      : type(type), size(size), data(new char[size * (type == XLA_FFI_DataType_F32 ? 4 : 2)]()) {}
  ~Array() { delete[] data; }
  Array(const Array&) = delete;

  // Fills the array with numbers from -0.5 to 0.5.
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

  double at(int64_t i) const {
    uint32_t bits = 0;
    if (type == XLA_FFI_DataType_F32) {
      std::memcpy(&bits, data + 4 * i, 4);
    } else {
      uint16_t half;
      std::memcpy(&half, data + 2 * i, 2);
      bits = static_cast<uint32_t>(half) << 16;
    }
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }

  // The sum, which is finite only if all numbers are.
  double sum() const {
    double total = 0;
    for (int64_t i = 0; i < size; ++i) total += at(i);
    return total;
  }

  // Its numbers. If it is empty: `count` times `absent`.
  std::vector<double> numbers(int64_t count, double absent) const {
    std::vector<double> result(count, absent);
    for (int64_t i = 0; i < size; ++i) result[i] = at(i);
    return result;
  }

  const XLA_FFI_DataType type;
  const int64_t size;
  char* const data;
};

// One call. Attributes must be added in the order of their names.
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
  Call& block(const jaxnorm::Block& b) {
    return integer("g", b.g).integer("k", b.k).integer("n", b.n).integer("s", b.s);
  }

  // Runs the call; returns the message of the error, or nothing. Allocation `failing` fails.
  std::string run(XLA_FFI_Handler* handler, int64_t failing = 0) {
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
    allocations_left = failing;
    XLA_FFI_Error* error = handler(&frame);
    ran_out = failing > 0 && allocations_left <= 0;
    allocations_left = 0;
    std::string message = error ? error->message : "";
    code = error ? error->code : XLA_FFI_Error_Code_OK;
    delete error;
    return message;
  }

  bool ran_out = false;  // whether an allocation failed
  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;

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

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32;

}  // namespace frames
