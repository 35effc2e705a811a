// The gradient of rows (rows.h).
#pragma once

#include "rows.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

constexpr int64_t kFewRows = 16;    // whose columns are added in float32
constexpr int64_t kTaskRows = 256;  // at least, for what a task keeps to be small beside them
constexpr int64_t kFewTasks = 4;    // fewer by row are too few for a machine's threads

// What is added up for scale and bias: in floats for a few rows, then in doubles.
struct Columns {
  float *few_scale, *few_bias;
  double *scale, *bias;

  void flush(int64_t features) const {
    sweep(features, [&](int, int64_t i, auto lanes) BODY {
      flush(scale + i, few_scale + i, lanes);
      flush(bias + i, few_bias + i, lanes);
    });
  }

  static BODY void flush(double* all, float* few, Whole) {
    store(all, load(all) + wide(load(few)));
    store(few, V{});
  }
  template <class Lanes>
  static BODY void flush(double* all, float* few, Lanes lanes) {
    for (int64_t i = 0; i < lanes.lanes; ++i) {
      all[i] += few[i];
      few[i] = 0;
    }
  }
};

// R rows that have one scale, from its first feature on.
template <int R, bool kCentred, bool kScale, class T>
struct Rows {
  const T *x, *dy;
  T* dx;
  const float* scale;
  int64_t k, elements;
  V mean[R], rstd[R], rest[R];

  Rows(const Backward& f, int64_t row, int64_t feature) : k(f.block.k) {
    x = static_cast<const T*>(f.x) + row * k;
    dy = static_cast<const T*>(f.dy) + row * k;
    dx = static_cast<T*>(f.dx) + row * k;
    scale = kScale ? f.scale + feature : nullptr;
    elements = f.block.groups() * k;
    for (int r = 0; r < R; ++r) {
      rstd[r] = all(f.rstd[row + r]);
      mean[r] = all(kCentred ? f.mean[row + r] : 0);
      rest[r] = all(kCentred ? -f.rest[row + r] * f.rstd[row + r] : 0);
    }
  }

  template <class Lanes>
  BODY V standardized(int r, int64_t i, Lanes lanes) const {
    V h = load(x + r * k + i, lanes);
    return kCentred ? (h - mean[r]) * rstd[r] + rest[r] : h * rstd[r];
  }

  template <class Lanes>
  BODY V scaled(V d, int64_t i, Lanes lanes) const {
    return kScale ? d * load(scale + i, lanes) : d;
  }

  // Adds the sums of g = dy * scale and of g * h to each row's, and those of columns.
  template <bool kColumns>
  BODY void add(int64_t begin, int64_t end, double* own, double* along, const Columns* columns) const {
    for (int64_t start = begin; start < end; start += kRowTile) {
      V sum_g[R] = {}, sum_gh[R] = {};
      sweep(smaller(kRowTile, end - start), [&](int, int64_t offset, auto lanes) BODY {
        const int64_t i = start + offset;
        V dscale = {}, dbias = {};
        for (int r = 0; r < R; ++r) {
          V d = keep(load(dy + r * k + i, lanes), lanes);
          V h = keep(standardized(r, i, lanes), lanes);
          V g = scaled(d, i, lanes);
          if (kCentred) sum_g[r] += g;
          sum_gh[r] += g * h;
          dscale += d * h;
          dbias += d;
        }
        if (kColumns) add_columns(*columns, i, dscale, dbias, lanes);
      });
      for (int r = 0; r < R; ++r) {
        own[r] += sum(sum_g[r]);
        along[r] += sum(sum_gh[r]);
      }
    }
  }

  template <class Lanes>
  static BODY void add_columns(const Columns& columns, int64_t i, V dscale, V dbias, Lanes lanes) {
    float *to_scale = columns.few_scale + i, *to_bias = columns.few_bias + i;
    store(to_scale, load(to_scale, lanes) + dscale, lanes);
    store(to_bias, load(to_bias, lanes) + dbias, lanes);
  }

  // dx, from the sums; and the columns, from `begin` on, where they have not been added before.
  template <bool kColumns>
  BODY void write_dx(int64_t begin, int64_t end, const double* own, const double* along,
                const Columns* columns) const {
    for (int r = 0; r < R; ++r) {
      const V a = all(-own[r] / k), b = all(-along[r] / k);
      const bool streamed = streams(dx + r * k + begin, elements);
      sweep(end - begin, [&](int, int64_t offset, auto lanes) BODY {
        const int64_t i = begin + offset;
        __builtin_prefetch(x + (r + R) * k + i);  // the next rows, while these are computed
        __builtin_prefetch(dy + (r + R) * k + i);
        V d = load(dy + r * k + i, lanes), h = standardized(r, i, lanes), g = scaled(d, i, lanes);
        if (kCentred) g += a;
        write(dx + r * k + i, plain<T>((g + b * h) * rstd[r]), lanes, streamed);
        if (kColumns) {
          d = keep(d, lanes);
          add_columns(*columns, offset, d * keep(h, lanes), d, lanes);
        }
      });
    }
  }
};

// Each task has some rows: all is read once, but each needs columns of its own.
template <bool kCentred, bool kScale, bool kColumns, class T>
static void backward_by_row(const Backward& f, Pool& pool) {
  const Block block = f.block;
  const int64_t rows = block.groups(), features = block.features(), k = block.k;
  const int64_t tasks = tasks_for(rows * k, kColumns ? larger(1, block.n / kTaskRows) : rows);
  const int64_t each = kColumns ? features : 0;
  Scratch<float> few(2 * tasks * each);
  Scratch<double> all(2 * tasks * each);
  parallel(pool, tasks, [&](int64_t task) {
    const int64_t at = 2 * task * each, end = rows * (task + 1) / tasks;
    const Columns columns = {few + at, few + (at + each), all + at, all + (at + each)};
    int64_t unflushed = 0;
    for (int64_t row = rows * task / tasks; row < end;) {
      double own[2] = {}, along[2] = {};
      const int count = block.g == 1 && row + 2 <= end ? 2 : 1;
      if (count == 2) {
        const Rows<2, kCentred, kScale, T> some(f, row, 0);
        some.template add<kColumns>(0, k, own, along, &columns);
        some.template write_dx<false>(0, k, own, along, nullptr);
      } else {
        const int64_t feature = row % block.g * k;
        const Columns here = {columns.few_scale + feature, columns.few_bias + feature,
                              columns.scale, columns.bias};
        const Rows<1, kCentred, kScale, T> one(f, row, feature);
        one.template add<kColumns>(0, k, own, along, &here);
        one.template write_dx<false>(0, k, own, along, nullptr);
      }
      row += count;
      unflushed += count;
      if (kColumns && unflushed >= kFewRows * block.g) {
        columns.flush(features);
        unflushed = 0;
      }
    }
    if (kColumns) columns.flush(features);
  });
  if (!kColumns) return;
  const int64_t parts = tasks_for(tasks * features, features);
  parallel(pool, parts, [&](int64_t part) {
    for (int64_t i = features * part / parts; i < features * (part + 1) / parts; ++i) {
      double scale = 0, bias = 0;
      for (int64_t task = 0; task < tasks; ++task) {
        scale += all[2 * task * each + i];
        bias += all[(2 * task + 1) * each + i];
      }
      put(f, i, scale, bias);
    }
  });
}

// Each task has some features of all rows, of which there are few: the columns need nothing, but
// all is read twice.
template <bool kCentred, bool kScale, class T>
static void backward_by_feature(const Backward& f, Pool& pool) {
  constexpr int64_t kPart = 16384, kStrip = 512;
  const int64_t rows = f.block.n, k = f.block.k;
  const int64_t parts = (k + kPart - 1) / kPart, strips = (k + kStrip - 1) / kStrip;
  Scratch<double> own(rows * parts), along(rows * parts);
  parallel(pool, rows * parts, [&](int64_t i) {
    const int64_t row = i / parts, begin = i % parts * kPart;
    const Rows<1, kCentred, kScale, T> one(f, row, 0);
    one.template add<false>(begin, smaller(k, begin + kPart), own + i, along + i, nullptr);
  });
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t part = 1; part < parts; ++part) {
      own[row * parts] += own[row * parts + part];
      along[row * parts] += along[row * parts + part];
    }
  }
  const int64_t tasks = tasks_for(rows * k, strips);
  parallel(pool, tasks, [&](int64_t task) {
    for (int64_t strip = strips * task / tasks; strip < strips * (task + 1) / tasks; ++strip) {
      float few[2][kStrip] = {};
      double all[2][kStrip] = {};
      const Columns columns = {few[0], few[1], all[0], all[1]};
      const int64_t begin = strip * kStrip, end = smaller(k, begin + kStrip);
      for (int64_t row = 0; row < rows; ++row) {
        const Rows<1, kCentred, kScale, T> one(f, row, 0);
        one.template write_dx<true>(begin, end, own + row * parts, along + row * parts, &columns);
        if (row % kFewRows == kFewRows - 1) columns.flush(kStrip);
      }
      columns.flush(kStrip);
      for (int64_t i = begin; i < end; ++i) put(f, i, all[0][i - begin], all[1][i - begin]);
    }
  });
}

template <bool kCentred, bool kScale, bool kColumns, class T>
static void rows_backward(const Backward& f, Pool& pool) {
  const int64_t elements = f.block.n * f.block.example();
  if constexpr (kColumns) {
    const bool few = f.block.n / kTaskRows < smaller(kFewTasks, tasks_for(elements, elements));
    if (few && f.block.g == 1 && elements >= 1 << 16) {
      return backward_by_feature<kCentred, kScale, T>(f, pool);
    }
  }
  backward_by_row<kCentred, kScale, kColumns, T>(f, pool);
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
