// Statistics of rows: s = 1, and the k elements of a group stand side by side in memory.
#pragma once

#include "moments.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

constexpr int64_t kRowTile = 2048;

template <class T>
static inline float row_mean(const T* x, int64_t k) {
  V total[4] = {};
  sweep(k, [&](int u, int64_t i, auto lanes) BODY { total[u] += keep(load(x + i, lanes), lanes); });
  return static_cast<float>(sum((total[0] + total[1]) + (total[2] + total[3])) / k);
}

template <bool kCentred, class T>
static inline void add_row(Sums& sums, const T* x, int64_t k, float pivot) {
  V first[4] = {}, second[4] = {};
  sweep(k, [&](int u, int64_t i, auto lanes) BODY {
    V d = load(x + i, lanes);
    d = keep(kCentred ? d - pivot : d, lanes);
    if (kCentred) first[u] += d;
    second[u] += d * d;
  });
  sums.add(k, pivot, kCentred ? sum((first[0] + first[1]) + (first[2] + first[3])) : 0,
           sum((second[0] + second[1]) + (second[2] + second[3])));
}

// The moments of R rows. Those of one tile wait for each other's results nowhere, so that the
// machine works on them at the same time.
template <int R, bool kCentred, class T>
static inline void row_moments(Moment* moments, const T* x, int64_t k, double epsilon) {
  Sums sums[R] = {};
  for (int64_t start = 0; start < k; start += kRowTile) {
    const int64_t size = smaller(kRowTile, k - start);
    float pivots[R] = {};
    for (int r = 0; kCentred && r < R; ++r) {
      pivots[r] = start == 0 ? row_mean(x + r * k, size) : sums[r].mean();
    }
    for (int r = 0; r < R; ++r) add_row<kCentred>(sums[r], x + r * k + start, size, pivots[r]);
  }
  for (int r = 0; r < R; ++r) {
    if (!__builtin_isfinite(sums[r].second)) {
      sums[r] = wide_sums(k, kCentred, [=](int64_t i) { return get(x + r * k + i); });
    }
  }
  for (int r = 0; r < R; ++r) moments[r] = finish(sums[r], epsilon, kCentred);
}

template <int R, bool kCentred, bool kScale, bool kBias, class T>
static inline void normalize_rows(const Forward& f, int64_t row) {
  const int64_t k = f.block.k, feature = f.block.g == 1 ? 0 : row % f.block.g * k;
  const T* x = static_cast<const T*>(f.x) + row * k;
  T* y = static_cast<T*>(f.y) + row * k;
  const float* scale = kScale ? f.scale + feature : nullptr;
  const float* bias = kBias ? f.bias + feature : nullptr;
  Moment moments[R];
  row_moments<R, kCentred>(moments, x, k, f.epsilon);
  for (int r = 0; r < R; ++r) {
    if (kCentred) f.stats.mean[row + r] = moments[r].mean;
    if (kCentred) f.stats.rest[row + r] = moments[r].rest;
    f.stats.var[row + r] = moments[r].var;
    f.stats.rstd[row + r] = moments[r].rstd;
  }
  for (int r = 0; r < R; ++r, x += k, y += k) {
    const V mean = all(moments[r].mean), rstd = all(moments[r].rstd);
    const V rest = all(-moments[r].rest * moments[r].rstd);
    const bool streamed = streams(y, f.block.groups() * k);
    sweep(k, [&](int, int64_t i, auto lanes) BODY {
      __builtin_prefetch(x + R * k + i);  // the next rows, while these are computed
      V h = load(x + i, lanes);
      h = kCentred ? (h - mean) * rstd + rest : h * rstd;
      if (kScale) h *= load(scale + i, lanes);
      if (kBias) h += load(bias + i, lanes);
      write(y + i, plain<T>(h), lanes, streamed);
    });
  }
}

template <bool kCentred, bool kScale, bool kBias, class T>
static void rows_forward(const Forward& f, Pool& pool) {
  const int64_t rows = f.block.groups(), tasks = tasks_for(rows * f.block.k, rows);
  const bool together = f.block.g == 1 && f.block.k <= kRowTile / 4;
  parallel(pool, tasks, [&](int64_t task) {
    const int64_t end = rows * (task + 1) / tasks;
    for (int64_t row = rows * task / tasks; row < end;) {
      if (together && row + 4 <= end) {
        normalize_rows<4, kCentred, kScale, kBias, T>(f, row);
        row += 4;
      } else {
        normalize_rows<1, kCentred, kScale, kBias, T>(f, row);
        row += 1;
      }
    }
  });
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
