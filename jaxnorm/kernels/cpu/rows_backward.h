// The gradients for rows (rows.h).
#pragma once

#include "rows.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

constexpr int64_t kFlushRows = 16;  // The columns of these rows are added in float32.
constexpr int64_t kTaskRows = 256;  // The least, so that the sums of a task are small beside them.
constexpr int64_t kMinTasks = 4;    // Fewer tasks do not use all threads.

// The sums of columns, for scale and bias: partial sums of kFlushRows rows in float32, which are added
// to the sums in float64.
struct ColumnSums {
  float *partial_scale, *partial_bias;
  double *scale, *bias;

  void flush(int64_t features) const {
    for_each_vector(features, [&](int, int64_t i, auto lanes) BODY {
      flush(scale + i, partial_scale + i, lanes);
      flush(bias + i, partial_bias + i, lanes);
    });
  }

  static BODY void flush(double* sum, float* partial, Whole) {
    StoreU(sum, LoadU(sum) + PromoteTo(LoadU(partial)));
    StoreU(partial, Zero());
  }
  template <class Lanes>
  static BODY void flush(double* sum, float* partial, Lanes lanes) {
    for (int64_t i = 0; i < lanes.lanes; ++i) {
      sum[i] += partial[i];
      partial[i] = 0;
    }
  }
};

// R rows that share one scale, which begins at `feature`.
template <int R, bool kSubtractMean, bool kScale, class T>
struct Rows {
  const T *x, *dy, *d_residual_sum;
  T* dx;
  const float* scale;
  int64_t k, elements;
  VF32 mean[R], rstd[R], low[R];

  Rows(const Backward& f, int64_t row, int64_t feature) : k(f.block.k) {
    x = static_cast<const T*>(f.x) + row * k;
    dy = static_cast<const T*>(f.dy) + row * k;
    d_residual_sum = f.d_residual_sum ? static_cast<const T*>(f.d_residual_sum) + row * k : nullptr;
    dx = static_cast<T*>(f.dx) + row * k;
    scale = kScale ? f.scale + feature : nullptr;
    elements = f.elements;
    for (int r = 0; r < R; ++r) {
      rstd[r] = Set(f.rstd[row + r]);
      mean[r] = Set(kSubtractMean ? f.mean_high[row + r] : 0);
      low[r] = Set(kSubtractMean ? -f.mean_low[row + r] * f.rstd[row + r] : 0);
    }
  }

  template <class Lanes>
  BODY VF32 load_x_hat(int r, int64_t i, Lanes lanes) const {
    VF32 element = LoadN(x + r * k + i, lanes);
    return kSubtractMean ? (element - mean[r]) * rstd[r] + low[r] : element * rstd[r];
  }

  template <class Lanes>
  BODY VF32 scaled(VF32 d, int64_t i, Lanes lanes) const {
    return kScale ? d * LoadN(scale + i, lanes) : d;
  }

  // Adds dy * scale and dy * scale * x_hat to the sums of each row, and dy and dy * x_hat to the sums
  // of columns.
  template <bool kColumns>
  BODY void add(int64_t begin, int64_t end, double* sum_dy, double* sum_dy_xhat,
                const ColumnSums* columns) const {
    Half64 part_dy[R] = {}, part_dy_xhat[R] = {};
    for_each_run(end - begin, [&](int64_t start, int64_t size) BODY {
      VF32 run_dy[R] = {}, run_dy_xhat[R] = {};
      for_each_vector(size, [&](int, int64_t offset, auto lanes) BODY {
        const int64_t i = begin + start + offset;
        VF32 dscale = {}, dbias = {};
        for (int r = 0; r < R; ++r) {
          VF32 d = IfThenElseZero(lanes, LoadN(dy + r * k + i, lanes));
          VF32 x_hat = IfThenElseZero(lanes, load_x_hat(r, i, lanes));
          VF32 g = scaled(d, i, lanes);
          if (kSubtractMean) run_dy[r] += g;
          run_dy_xhat[r] += g * x_hat;
          dscale += d * x_hat;
          dbias += d;
        }
        if (kColumns) add_columns(*columns, i, dscale, dbias, lanes);
      });
      for (int r = 0; r < R; ++r) {
        if (kSubtractMean) part_dy[r] += promote_halves(run_dy[r]);
        part_dy_xhat[r] += promote_halves(run_dy_xhat[r]);
      }
    });
    for (int r = 0; r < R; ++r) {
      sum_dy[r] += ReduceSum(part_dy[r]);
      sum_dy_xhat[r] += ReduceSum(part_dy_xhat[r]);
    }
  }

  template <class Lanes>
  static BODY void add_columns(const ColumnSums& columns, int64_t i, VF32 dscale, VF32 dbias,
                               Lanes lanes) {
    float *scale = columns.partial_scale + i, *bias = columns.partial_bias + i;
    StoreN(scale, LoadN(scale, lanes) + dscale, lanes);
    StoreN(bias, LoadN(bias, lanes) + dbias, lanes);
  }

  // Writes dx from the sums of rows, and adds to the sums of columns from `begin` on if `add` did not.
  template <bool kColumns>
  BODY void write_dx(int64_t begin, int64_t end, const double* sum_dy, const double* sum_dy_xhat,
                     const ColumnSums* columns) const {
    for (int r = 0; r < R; ++r) {
      const VF32 offset_dy = Set(-sum_dy[r] / k), slope = Set(-sum_dy_xhat[r] / k);
      const bool streamed = should_stream(dx + r * k + begin, elements);
      for_each_vector(end - begin, [&](int, int64_t offset, auto lanes) BODY {
        const int64_t i = begin + offset;
        __builtin_prefetch(x + (r + R) * k + i);  // the next rows
        __builtin_prefetch(dy + (r + R) * k + i);
        VF32 d = LoadN(dy + r * k + i, lanes), x_hat = load_x_hat(r, i, lanes);
        VF32 g = scaled(d, i, lanes);
        if (kSubtractMean) g += offset_dy;
        g = (g + slope * x_hat) * rstd[r];
        if (d_residual_sum) g += LoadN(d_residual_sum + r * k + i, lanes);
        store_or_stream(dx + r * k + i, canonical_nan<T>(g), lanes, streamed);
        if (kColumns) {
          d = IfThenElseZero(lanes, d);
          add_columns(*columns, offset, d * IfThenElseZero(lanes, x_hat), d, lanes);
        }
      });
    }
  }
};

// Divides the rows among tasks. Each array is read once, but each task needs its own sums of columns.
template <bool kSubtractMean, bool kScale, bool kColumns, class T>
static void backward_by_row(const Backward& f, Pool& pool) {
  const Block block = f.block;
  const int64_t rows = block.groups(), features = block.features(), k = block.k;
  const int64_t tasks = num_tasks(rows * k, kColumns ? max(1, block.n / kTaskRows) : rows);
  const int64_t width = kColumns ? features : 0;
  Scratch<float> partials(pool, 2 * tasks * width);
  Scratch<double> sums(pool, 2 * tasks * width);
  if (!pool.memory) return;
  parallel_for(pool, tasks, [&](int64_t task) {
    const int64_t start = 2 * task * width, end = rows * (task + 1) / tasks;
    const ColumnSums columns = {partials + start, partials + (start + width), sums + start,
                                sums + (start + width)};
    int64_t unflushed = 0;
    for (int64_t row = rows * task / tasks; row < end;) {
      double sum_dy[2] = {}, sum_dy_xhat[2] = {};
      const int count = block.g == 1 && row + 2 <= end ? 2 : 1;
      if (count == 2) {
        const Rows<2, kSubtractMean, kScale, T> pair(f, row, 0);
        pair.template add<kColumns>(0, k, sum_dy, sum_dy_xhat, &columns);
        pair.template write_dx<false>(0, k, sum_dy, sum_dy_xhat, nullptr);
      } else {
        const int64_t feature = row % block.g * k;
        const ColumnSums group_columns = {columns.partial_scale + feature, columns.partial_bias + feature,
                                          columns.scale, columns.bias};
        const Rows<1, kSubtractMean, kScale, T> single(f, row, feature);
        single.template add<kColumns>(0, k, sum_dy, sum_dy_xhat, &group_columns);
        single.template write_dx<false>(0, k, sum_dy, sum_dy_xhat, nullptr);
      }
      row += count;
      unflushed += count;
      if (kColumns && unflushed >= kFlushRows * block.g) {
        columns.flush(features);
        unflushed = 0;
      }
    }
    if (kColumns) columns.flush(features);
  });
  if (!kColumns) return;
  const int64_t parts = num_tasks(tasks * features, features);
  parallel_for(pool, parts, [&](int64_t part) {
    for (int64_t i = features * part / parts; i < features * (part + 1) / parts; ++i) {
      double scale = 0, bias = 0;
      for (int64_t task = 0; task < tasks; ++task) {
        scale += sums[2 * task * width + i];
        bias += sums[(2 * task + 1) * width + i];
      }
      store_feature_gradients(f, i, scale, bias);
    }
  });
}

// Divides the features among tasks, for a small number of rows. No task needs its own sums of
// columns, but each array is read twice.
template <bool kSubtractMean, bool kScale, class T>
static void backward_by_feature(const Backward& f, Pool& pool) {
  constexpr int64_t kPart = 16384, kStrip = 512;
  const int64_t rows = f.block.n, k = f.block.k;
  const int64_t parts = (k + kPart - 1) / kPart, strips = (k + kStrip - 1) / kStrip;
  Scratch<double> sum_dy(pool, rows * parts), sum_dy_xhat(pool, rows * parts);
  if (!pool.memory) return;
  parallel_for(pool, rows * parts, [&](int64_t i) {
    const int64_t row = i / parts, begin = i % parts * kPart;
    const Rows<1, kSubtractMean, kScale, T> single(f, row, 0);
    single.template add<false>(begin, min(k, begin + kPart), sum_dy + i, sum_dy_xhat + i, nullptr);
  });
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t part = 1; part < parts; ++part) {
      sum_dy[row * parts] += sum_dy[row * parts + part];
      sum_dy_xhat[row * parts] += sum_dy_xhat[row * parts + part];
    }
  }
  const int64_t tasks = num_tasks(rows * k, strips);
  parallel_for(pool, tasks, [&](int64_t task) {
    for (int64_t strip = strips * task / tasks; strip < strips * (task + 1) / tasks; ++strip) {
      float partials[2][kStrip] = {};
      double sums[2][kStrip] = {};
      const ColumnSums columns = {partials[0], partials[1], sums[0], sums[1]};
      const int64_t begin = strip * kStrip, end = min(k, begin + kStrip);
      for (int64_t row = 0; row < rows; ++row) {
        const Rows<1, kSubtractMean, kScale, T> single(f, row, 0);
        single.template write_dx<true>(begin, end, sum_dy + row * parts, sum_dy_xhat + row * parts,
                                       &columns);
        if (row % kFlushRows == kFlushRows - 1) columns.flush(kStrip);
      }
      columns.flush(kStrip);
      for (int64_t i = begin; i < end; ++i) {
        store_feature_gradients(f, i, sums[0][i - begin], sums[1][i - begin]);
      }
    }
  });
}

template <bool kSubtractMean, bool kScale, bool kColumns, class T>
static void rows_backward(const Backward& f, Pool& pool) {
  const int64_t elements = f.block.n * f.block.example();
  if constexpr (kColumns) {
    const bool few_rows = f.block.n / kTaskRows < min(kMinTasks, num_tasks(elements, elements));
    if (few_rows && f.block.g == 1 && elements >= 1 << 16) {
      return backward_by_feature<kSubtractMean, kScale, T>(f, pool);
    }
  }
  backward_by_row<kSubtractMean, kScale, kColumns, T>(f, pool);
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
