// Runs the blocks of one call: allocates their memory, and divides them among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "norms.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm {

// Runs tasks on the calling thread.
class CallingThread final : public Pool {
 public:
  void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) override {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
  }
};

template <class Run>
void run_block(const Run& run, int64_t i, Pool& pool, char* memory) {
  pool.memory = memory;
  pool.bytes_used = 0;
  run(i, pool);
}

// Calls run(i, pool) for each of `batch` blocks. If there are at least as many blocks as threads, a
// thread computes whole blocks; otherwise all threads share each block. Throws std::bad_alloc before
// any task runs.
template <class Run>
void each_block(xla::ffi::ThreadPool& threads, int64_t batch, int64_t elements, const Run& run) {
  constexpr int64_t kElements = 1 << 16, kMaxTasks = 64;
  const int64_t workers = std::max<int64_t>(threads.num_threads(), 1);
  const int64_t tasks = std::clamp<int64_t>(elements / kElements, 1, std::min(batch, kMaxTasks));
  const int64_t parts = batch < workers ? 1 : std::min(tasks, workers);  // of the memory
  CallingThread counter;
  run(0, counter);
  const int64_t bytes = counter.bytes_used;  // of one block
  const std::unique_ptr<char[]> memory(new char[parts * bytes]);
  if (batch < workers) {
    for (int64_t i = 0; i < batch; ++i) {
      Team team(threads);
      run_block(run, i, team, memory.get());
    }
    return;
  }
  struct Context {
    const Run& run;
    int64_t batch, tasks, bytes;
    char* memory;
    std::atomic<bool>* in_use;  // for each part of the memory
  };
  std::atomic<bool> in_use[kMaxTasks] = {};
  const Context context = {run, batch, tasks, bytes, memory.get(), in_use};
  Team team(threads);
  team.run(
      tasks,
      [](const void* data, int64_t task) {
        const Context& c = *static_cast<const Context*>(data);
        int64_t part = 0;
        while (c.in_use[part].exchange(true, std::memory_order_acquire)) ++part;
        CallingThread pool;
        for (int64_t i = c.batch * task / c.tasks; i < c.batch * (task + 1) / c.tasks; ++i) {
          run_block(c.run, i, pool, c.memory + part * c.bytes);
        }
        c.in_use[part].store(false, std::memory_order_release);
      },
      &context);
}

}  // namespace jaxnorm
