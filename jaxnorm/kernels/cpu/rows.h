// Norms of rows: s = 1, and the k elements of a group are contiguous in memory.
#pragma once

#include "moments.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

constexpr int64_t kRowTile = 2048;
constexpr int64_t kRun = 32 * kLanes;  // the elements that are added in float32 (moments.h)

// Calls body(begin, size) for the runs of n elements. The last run may be longer by up to one vector,
// because the elements of a run shorter than a vector would be copied one by one.
template <class Body>
static inline BODY void for_each_run(int64_t n, Body body) {
  for (int64_t begin = 0, size; begin < n; begin += size) {
    size = n - begin < kRun + kLanes ? n - begin : kRun;
    body(begin, size);
  }
}

template <class T>
static inline float row_mean(const T* x, int64_t k) {
  VF32 total[4] = {};
  for_each_vector(k, [&](int u, int64_t i, auto lanes) BODY {
    total[u] += IfThenElseZero(lanes, LoadN(x + i, lanes));
  });
  return static_cast<float>(ReduceSum((total[0] + total[1]) + (total[2] + total[3])) / k);
}

template <bool kSubtractMean, class T>
static inline void add_row(Sums& sums, const T* x, int64_t k, float pivot) {
  Half64 first = {}, second = {};
  for_each_run(k, [&](int64_t begin, int64_t size) BODY {
    VF32 run1[4] = {}, run2[4] = {};
    for_each_vector(size, [&](int u, int64_t i, auto lanes) BODY {
      VF32 d = LoadN(x + begin + i, lanes);
      d = IfThenElseZero(lanes, kSubtractMean ? d - pivot : d);
      if (kSubtractMean) run1[u] += d;
      run2[u] += d * d;
    });
    if (kSubtractMean) first += promote_halves((run1[0] + run1[1]) + (run1[2] + run1[3]));
    second += promote_halves((run2[0] + run2[1]) + (run2[2] + run2[3]));
  });
  sums.add(k, pivot, kSubtractMean ? ReduceSum(first) : 0, ReduceSum(second));
}

// Computes the moments of R rows. In each tile the rows do not depend on each other, so that the
// processor can overlap their instructions.
template <int R, bool kSubtractMean, class T>
static inline void row_moments(Moment* moments, const T* x, int64_t k, double epsilon) {
  Sums sums[R] = {};
  for (int64_t start = 0; start < k; start += kRowTile) {
    const int64_t size = min(kRowTile, k - start);
    float pivots[R] = {};
    for (int r = 0; kSubtractMean && r < R; ++r) {
      pivots[r] = start == 0 ? row_mean(x + r * k, size) : sums[r].mean();
    }
    for (int r = 0; r < R; ++r) add_row<kSubtractMean>(sums[r], x + r * k + start, size, pivots[r]);
  }
  for (int r = 0; r < R; ++r) {
    if (!__builtin_isfinite(sums[r].second)) {
      sums[r] = wide_sums(k, kSubtractMean, [=](int64_t i) { return load_scalar(x + r * k + i); });
    }
  }
  for (int r = 0; r < R; ++r) moments[r] = finish(sums[r], epsilon, kSubtractMean);
}

// Normalizes the rows of `x`: the input itself, or the residual sums in float32.
template <int R, bool kSubtractMean, bool kScale, bool kBias, class T, class X>
static inline void normalize_loaded(const X* x, const Forward& f, int64_t row) {
  const int64_t k = f.block.k, feature = f.block.g == 1 ? 0 : row % f.block.g * k;
  T* y = static_cast<T*>(f.y) + row * k;
  const float* scale = kScale ? f.scale + feature : nullptr;
  const float* bias = kBias ? f.bias + feature : nullptr;
  Moment moments[R];
  row_moments<R, kSubtractMean>(moments, x, k, f.epsilon);
  for (int r = 0; r < R; ++r) {
    if (kSubtractMean) f.stats.mean_high[row + r] = moments[r].mean_high;
    if (kSubtractMean) f.stats.mean_low[row + r] = moments[r].mean_low;
    f.stats.var[row + r] = moments[r].var;
    f.stats.rstd[row + r] = moments[r].rstd;
  }
  for (int r = 0; r < R; ++r, x += k, y += k) {
    const VF32 mean = Set(moments[r].mean_high), rstd = Set(moments[r].rstd);
    const VF32 low = Set(-moments[r].mean_low * moments[r].rstd);
    const bool streamed = should_stream(y, f.elements);
    for_each_vector(k, [&](int, int64_t i, auto lanes) BODY {
      __builtin_prefetch(x + R * k + i);  // the next rows
      VF32 result = LoadN(x + i, lanes);
      result = kSubtractMean ? (result - mean) * rstd + low : result * rstd;
      if (kScale) result *= LoadN(scale + i, lanes);
      if (kBias) result += LoadN(bias + i, lanes);
      store_or_stream(y + i, canonical_nan<T>(result), lanes, streamed);
    });
  }
}

// Writes x + residual to `sums` in float32, and rounded to the residual sum. Both may be one array.
template <class T>
static inline void add_residual(const Forward& f, int64_t start, int64_t size, float* sums) {
  const T* x = static_cast<const T*>(f.x) + start;
  const T* residual = static_cast<const T*>(f.residual) + start;
  T* residual_sum = static_cast<T*>(f.residual_sum) + start;
  const bool separate = static_cast<void*>(sums) != residual_sum;
  const bool streamed = separate && should_stream(residual_sum, f.elements);
  for_each_vector(size, [&](int, int64_t i, auto lanes) BODY {
    __builtin_prefetch(x + size + i);  // the next rows
    __builtin_prefetch(residual + size + i);
    VF32 sum = LoadN(x + i, lanes) + LoadN(residual + i, lanes);
    StoreN(sums + i, sum, lanes);
    if (separate) store_or_stream(residual_sum + i, sum, lanes, streamed);
  });
}

template <int R, bool kSubtractMean, bool kScale, bool kBias, class T>
static inline void normalize_rows(const Forward& f, int64_t row, float* memory) {
  const int64_t k = f.block.k, start = row * k;
  if (!f.residual) {
    const T* x = static_cast<const T*>(f.x) + start;
    return normalize_loaded<R, kSubtractMean, kScale, kBias, T>(x, f, row);
  }
  // A longer row is float32, so the residual sum itself is used.
  float* sums = R * k <= kLongestSum ? memory : static_cast<float*>(f.residual_sum) + start;
  add_residual<T>(f, start, R * k, sums);
  normalize_loaded<R, kSubtractMean, kScale, kBias, T>(sums, f, row);
}

template <bool kSubtractMean, bool kScale, bool kBias, class T>
static void rows_forward(const Forward& f, Pool& pool) {
  if (!pool.memory) return;  // no memory is needed
  const int64_t rows = f.block.groups(), tasks = num_tasks(rows * f.block.k, rows);
  const bool four_at_once = f.block.g == 1 && f.block.k <= kRowTile / 4;
  parallel_for(pool, tasks, [&](int64_t task) {
    const int64_t end = rows * (task + 1) / tasks;
    float memory[kLongestSum];  // used if there is a residual
    for (int64_t row = rows * task / tasks; row < end;) {
      if (four_at_once && row + 4 <= end) {
        normalize_rows<4, kSubtractMean, kScale, kBias, T>(f, row, memory);
        row += 4;
      } else {
        normalize_rows<1, kSubtractMean, kScale, kBias, T>(f, row, memory);
        row += 1;
      }
    }
  });
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
