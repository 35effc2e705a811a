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
    for (int r = 0; kCentred && r < R; ++r) pivots[r] = row_mean(x + r * k + start, size);
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
  const float *scale = f.scale + feature, *bias = f.bias + feature;
  Moment moments[R];
  row_moments<R, kCentred>(moments, x, k, f.epsilon);
  for (int r = 0; r < R; ++r) {
    f.stats.mean[row + r] = moments[r].mean;
    f.stats.rest[row + r] = moments[r].rest;
    f.stats.var[row + r] = moments[r].var;
    f.stats.rstd[row + r] = moments[r].rstd;
  }
  for (int r = 0; r < R; ++r, x += k, y += k) {
    const V mean = all(moments[r].mean), rstd = all(moments[r].rstd);
    const V rest = all(-moments[r].rest * moments[r].rstd);
    sweep(k, [&](int, int64_t i, auto lanes) BODY {
      __builtin_prefetch(x + R * k + i);  // the next rows, while these are computed
      V h = load(x + i, lanes);
      h = kCentred ? (h - mean) * rstd + rest : h * rstd;
      if (kScale) h *= load(scale + i, lanes);
      if (kBias) h += load(bias + i, lanes);
      store(y + i, h, lanes);
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

// What one task adds up for scale and bias: floats for a few rows, then doubles.
struct Columns {
  float *few_scale, *few_bias;
  double *scale, *bias;
  int64_t features;

  void flush() {
    for (int64_t i = 0; i < features; ++i) {
      scale[i] += few_scale[i];
      bias[i] += few_bias[i];
      few_scale[i] = few_bias[i] = 0;
    }
  }
};

// R rows that have one scale.
template <int R, bool kCentred, bool kScale, bool kColumns, class T>
static inline void row_gradients(const Backward& f, int64_t row, const Columns& columns) {
  const int64_t k = f.block.k, feature = row % f.block.g * k;
  const T* x = static_cast<const T*>(f.x) + row * k;
  const T* dy = static_cast<const T*>(f.dy) + row * k;
  T* dx = static_cast<T*>(f.dx) + row * k;
  V mean[R], rstd[R], rest[R];
  for (int r = 0; r < R; ++r) {
    rstd[r] = all(f.rstd[row + r]);
    mean[r] = all(kCentred ? f.mean[row + r] : 0);
    rest[r] = all(kCentred ? -f.rest[row + r] * f.rstd[row + r] : 0);
  }
  auto standardized = [&](int r, int64_t i, auto lanes) BODY {
    V h = load(x + r * k + i, lanes);
    return kCentred ? (h - mean[r]) * rstd[r] + rest[r] : h * rstd[r];
  };
  auto scaled = [&](V g, int64_t i, auto lanes) BODY {
    return kScale ? g * load(f.scale + feature + i, lanes) : g;
  };
  double own[R] = {}, along[R] = {};  // the sums of g and of g * h
  for (int64_t start = 0; start < k; start += kRowTile) {
    V sum_g[R] = {}, sum_gh[R] = {};
    auto body = [&](int64_t i, auto lanes) BODY {
      V dscale = {}, dbias = {};
      for (int r = 0; r < R; ++r) {
        V d = keep(load(dy + r * k + i, lanes), lanes), h = standardized(r, i, lanes);
        V g = scaled(d, i, lanes);
        if (kCentred) sum_g[r] += g;
        sum_gh[r] += g * h;
        dscale += d * h;
        dbias += d;
      }
      if (kColumns) {
        float *to_scale = columns.few_scale + feature + i, *to_bias = columns.few_bias + feature + i;
        store(to_scale, load(to_scale, lanes) + dscale, lanes);
        store(to_bias, load(to_bias, lanes) + dbias, lanes);
      }
    };
    sweep(smaller(kRowTile, k - start),
          [&](int, int64_t i, auto lanes) BODY { body(start + i, lanes); });
    for (int r = 0; r < R; ++r) {
      own[r] += sum(sum_g[r]);
      along[r] += sum(sum_gh[r]);
    }
  }
  for (int r = 0; r < R; ++r) {
    const V a = all(-own[r] / k), b = all(-along[r] / k);
    sweep(k, [&](int, int64_t i, auto lanes) BODY {
      __builtin_prefetch(x + (r + R) * k + i);
      __builtin_prefetch(dy + (r + R) * k + i);
      V g = scaled(load(dy + r * k + i, lanes), i, lanes);
      if (kCentred) g += a;
      store(dx + r * k + i, (g + b * standardized(r, i, lanes)) * rstd[r], lanes);
    });
  }
}

template <bool kCentred, bool kScale, bool kColumns, class T>
static void rows_backward(const Backward& f, Pool& pool) {
  constexpr int64_t kFew = 64;  // rows whose columns are added in float32
  const Block block = f.block;
  const int64_t rows = block.groups(), features = block.features();
  const int64_t tasks = tasks_for(rows * block.k, kColumns ? larger(1, block.n / kFew) : rows);
  const int64_t each = kColumns ? features : 0;
  Scratch<float> few(2 * tasks * each);
  Scratch<double> all(2 * tasks * each);
  parallel(pool, tasks, [&](int64_t task) {
    const int64_t at = 2 * task * each;
    Columns columns = {few + at, few + (at + each), all + at, all + (at + each), each};
    const int64_t end = rows * (task + 1) / tasks;
    int64_t row = rows * task / tasks, unflushed = 0;
    while (row < end) {
      const int count = block.g == 1 && row + 2 <= end ? 2 : 1;
      if (count == 2) {
        row_gradients<2, kCentred, kScale, kColumns, T>(f, row, columns);
      } else {
        row_gradients<1, kCentred, kScale, kColumns, T>(f, row, columns);
      }
      row += count;
      unflushed += count;
      if (kColumns && unflushed >= kFew * block.g) {
        columns.flush();
        unflushed = 0;
      }
    }
    if (kColumns) columns.flush();
  });
  if (!kColumns) return;
  parallel(pool, tasks_for(tasks * features, features), [&](int64_t part) {
    const int64_t parts = tasks_for(tasks * features, features);
    for (int64_t i = features * part / parts; i < features * (part + 1) / parts; ++i) {
      double scale = 0, bias = 0;
      for (int64_t task = 0; task < tasks; ++task) {
        scale += all[2 * task * each + i];
        bias += all[(2 * task + 1) * each + i];
      }
      f.dscale[i] = static_cast<float>(scale);
      f.dbias[i] = static_cast<float>(bias);
    }
  });
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
