// The blocks of one call: their memory, and which threads compute them.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>

#include "norms.h"
#include "team.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm {

// Runs tasks on the thread that calls.
class Alone final : public Pool {
 public:
  void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) override {
    for (int64_t i = 0; i < tasks; ++i) task(context, i);
  }
};

template <class Run>
void run_block(const Run& run, int64_t i, Pool& pool, char* memory) {
  pool.memory = memory;
  pool.taken = 0;
  run(i, pool);
}

// run(i, pool) for each of `batch` blocks: a thread has whole blocks if there are enough for all
// threads, else all threads share each block. Throws std::bad_alloc, before any task runs.
template <class Run>
void each_block(xla::ffi::ThreadPool& threads, int64_t batch, int64_t elements, const Run& run) {
  constexpr int64_t kElements = 1 << 16, kMostTasks = 64;
  const int64_t workers = std::max<int64_t>(threads.num_threads(), 1);
  const int64_t tasks = std::clamp<int64_t>(elements / kElements, 1, std::min(batch, kMostTasks));
  const int64_t parts = batch < workers ? 1 : std::min(tasks, workers);  // blocks at a time
  Alone counter;
  run(0, counter);
  const int64_t bytes = counter.taken;
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
    std::atomic<bool>* used;  // whether a task has that part of the memory
  };
  std::atomic<bool> used[kMostTasks] = {};
  const Context context = {run, batch, tasks, bytes, memory.get(), used};
  Team team(threads);
  team.run(
      tasks,
      [](const void* given, int64_t task) {
        const Context& c = *static_cast<const Context*>(given);
        int64_t part = 0;
        while (c.used[part].exchange(true, std::memory_order_acquire)) ++part;
        Alone pool;
        for (int64_t i = c.batch * task / c.tasks; i < c.batch * (task + 1) / c.tasks; ++i) {
          run_block(c.run, i, pool, c.memory + part * c.bytes);
        }
        c.used[part].store(false, std::memory_order_release);
      },
      &context);
}

}  // namespace jaxnorm
