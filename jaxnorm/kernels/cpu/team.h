// The threads of one call: the one that calls, and helpers from XLA's own pool.
//
// Waking a thread takes as long as normalizing a hundred thousand elements. So helpers are requested
// once per call, and spin until the next phase. No thread waits for a helper that has not started:
// the calling thread takes tasks too, until all are taken.
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
    if (shared_) shared_->over = true;
  }

  void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) override {
    if (tasks < kFewestTasks || (shared_ && shared_->phases == kMostPhases) || !call_helpers(tasks)) {
      for (int64_t i = 0; i < tasks; ++i) task(context, i);
      return;
    }
    Phase& phase = shared_->phase[shared_->phases];
    phase.tasks = tasks;
    phase.task = task;
    phase.context = context;
    shared_->phases.fetch_add(1, std::memory_order_release);
    phase.take();
    for (int waited = 0; phase.done.load(std::memory_order_acquire) < tasks; ++waited) pause(waited);
  }

 private:
  static constexpr int64_t kFewestTasks = 2;
  static constexpr int kMostPhases = 8;
  static constexpr int kPatience = 2000;  // pauses: some tens of microseconds

  // Threads take its tasks one by one. A thread that is late finds none, and reads nothing else.
  struct Phase {
    int64_t tasks = 0;
    void (*task)(const void*, int64_t) = nullptr;
    const void* context = nullptr;
    std::atomic<int64_t> next{0}, done{0};

    void take() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        task(context, i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };

  // Outlives the call, because helpers may start after it.
  struct Shared {
    Phase phase[kMostPhases];
    std::atomic<int> phases{0};
    std::atomic<bool> over{false};

    void help() {
      int number = 0;
      for (int waited = 0; waited < kPatience && !over; ++waited) {
        for (; number < phases.load(std::memory_order_acquire); ++number, waited = 0) {
          phase[number].take();
        }
        pause(waited);
      }
    }
  };

  static void pause(int waited) {
    if (waited % 64 == 63) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }

  // Whether there are helpers.
  bool call_helpers(int64_t tasks) {
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
