// How the work of one call is divided into tasks, and the memory of the tasks.
#pragma once

#include "lanes.h"
#include "norms.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

// A target must not use std::min and std::max, which are inline (norms.h).
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// The number of tasks. It depends on the shape alone, so that sums are added in the same order on
// every machine. `limit` bounds the memory of the tasks.
static inline int64_t num_tasks(int64_t elements, int64_t limit) {
  constexpr int64_t kElements = 1 << 16;
  return max(1, min(min(elements / kElements, 64), limit));
}

// Calls task(i) for each i, in parallel.
template <class Task>
static void parallel_for(Pool& pool, int64_t tasks, const Task& task) {
  pool.run(
      tasks,
      [](const void* context, int64_t i) {
        (*static_cast<const Task*>(context))(i);
        FlushStream();
      },
      &task);
}

// Memory for one call, filled with zeros: the next part of the pool's memory. If the pool has none,
// only the bytes are counted, and the call must return.
template <class T>
class Scratch {
 public:
  Scratch(Pool& pool, int64_t size) {
    constexpr int64_t kCacheLine = 64;
    if (pool.memory) {
      data_ = reinterpret_cast<T*>(pool.memory + pool.bytes_used);
      for (int64_t i = 0; i < size; ++i) data_[i] = 0;
    }
    pool.bytes_used += (size * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
  }
  T* operator+(int64_t offset) const { return data_ + offset; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
};

// Stores the gradients of scale and bias of one feature, if they are computed.
static inline void store_feature_gradients(const Backward& f, int64_t feature, double dscale,
                                           double dbias) {
  if (f.dscale) f.dscale[feature] = static_cast<float>(dscale);
  if (f.dbias) f.dbias[feature] = static_cast<float>(dbias);
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
