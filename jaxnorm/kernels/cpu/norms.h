// The interface of targets. These declarations have the same meaning in all of them.
//
// A target is the same source, compiled for one kind of hardware. It must not use inline functions of
// the standard library: the linker keeps one copy of each. If the copy comes from a target for newer
// hardware, older machines fail.
#pragma once

#include <cstdint>

namespace jaxnorm {

// An array (n, s, g, k) in memory: n examples, s positions, g groups of k features. Statistics are
// shared over s and k; scale and bias have shape (g, k).
struct Block {
  int64_t n, s, g, k;
  int64_t features() const { return g * k; }
  int64_t example() const { return s * g * k; }
  int64_t groups() const { return n * g; }
};

// Arrays of shape (n, g). mean_high + mean_low is the mean to twice the precision. Both are read and
// written only if the mean is subtracted.
struct Statistics {
  float *mean_high, *mean_low, *var, *rstd;
};

// The longest row of bfloat16 that may have a residual: a thread keeps the sum of a row in float32.
constexpr int64_t kLongestSum = 1 << 14;

struct Forward {
  Block block;
  int64_t elements;  // in all blocks of the call
  double epsilon;
  bool subtract_mean;
  const void *x, *residual;   // null: no residual; with one, s = 1
  const float *scale, *bias;  // null: one, zero
  void *y, *residual_sum;     // residual_sum: null without a residual
  Statistics stats;
};

struct Backward {
  Block block;
  int64_t elements;  // as in Forward
  bool subtract_mean;
  const void *x, *dy, *d_residual_sum;  // null: no d_residual_sum; with one, s = 1
  const float* scale;
  const float *mean_high, *mean_low, *rstd;
  void* dx;
  float *dscale, *dbias;  // null: not computed
};

// Runs tasks 0, 1, ... in any order, on any threads, and returns when all have ended. A task must not
// throw, because XLA's threads do not catch exceptions. So memory is allocated before any task runs.
class Pool {
 public:
  virtual void run(int64_t tasks, void (*task)(const void*, int64_t), const void* context) = 0;

  char* memory = nullptr;  // of one call; null in a call that only counts the bytes that it needs
  int64_t bytes_used = 0;

 protected:
  ~Pool() = default;
};

enum class Element { kFloat32, kBfloat16 };

struct Target {
  const char* name;
  void (*forward)(Element, const Forward&, Pool&);
  void (*backward)(Element, const Backward&, Pool&);
};

extern const Target kBaseline;
#if defined(JAXNORM_AVX2)
extern const Target kAvx2;
#endif
#if defined(JAXNORM_AVX512)
extern const Target kAvx512;
#endif

}  // namespace jaxnorm
