// The threads of one call: the calling thread, and helpers from XLA's own pool.
//
// Waking a thread takes as long as normalizing a hundred thousand elements. So helpers are requested
// once per call, and spin until the next phase. The calling thread runs tasks too, until none is
// left, so no thread waits for a helper that has not started.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <thread>

#include "norms.h"
#include "xla/ffi/api/ffi.h"

namespace jaxnorm {

class Team final : public Pool {
 public:
  explicit Team(xla::ffi::ThreadPool& threads) : threads_(threads) {}

  ~Team() {
    if (shared_) shared_->finished = true;
  }

  void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) override {
    if (tasks < kMinTasks || (shared_ && shared_->phases == kMaxPhases) || !start_helpers(tasks)) {
      for (int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    Phase& phase = shared_->phase[shared_->phases];
    phase.tasks = tasks;
    phase.task = task;
    phase.context = context;
    shared_->phases.fetch_add(1, std::memory_order_release);
    phase.run_tasks();
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < tasks; ++spins) pause(spins);
  }

 private:
  static constexpr int64_t kMinTasks = 2;
  static constexpr int kMaxPhases = 8;
  static constexpr int kMaxSpins = 2000;  // pauses: some tens of microseconds

  // Threads run its tasks one by one. A late thread gets no task, and never reads `context`.
  struct Phase {
    int64_t tasks = 0;
    void (*task)(const void*, int64_t) = nullptr;
    const void* context = nullptr;
    std::atomic<int64_t> next{0}, done{0};

    void run_tasks() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(context, i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };

  // This outlives the call, because helpers may start after it.
  struct Shared {
    Phase phase[kMaxPhases];
    std::atomic<int> phases{0};
    std::atomic<bool> finished{false};

    void help() {
      int number = 0;
      for (int spins = 0; spins < kMaxSpins && !finished; ++spins) {
        for (; number < phases.load(std::memory_order_acquire); ++number, spins = 0) {
          phase[number].run_tasks();
        }
        pause(spins);
      }
    }
  };

  static void pause(int spins) {
    if (spins % 64 == 63) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  // Starts helpers in the first phase that needs them; returns whether there are any.
  bool start_helpers(int64_t tasks) {
    if (!shared_) {
      const int64_t helpers = std::min<int64_t>(threads_.num_threads(), tasks) - 1;
      if (helpers < 1) return false;
      shared_ = std::make_shared<Shared>();
      for (int64_t i = 0; i < helpers; ++i) {
        threads_.Schedule(std::function<void()>([shared = shared_] { shared->help(); }));
      }
    }
    return true;
  }

  xla::ffi::ThreadPool& threads_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace jaxnorm
