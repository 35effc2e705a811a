// The gradients for columns (columns.h).
#pragma once

#include "columns.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

// Adds, for each column, dy to `sum_dy` and dy * (x - mean) to `sum_dy_centred`, which is multiplied
// by rstd later. The sums are in float64: both are gradients of bias and scale. Where the terms
// cancel, such as 2^18 terms of both signs, rounding in float32 would be some units of the result.
template <class T>
static void add_gradients(double* sum_dy, double* sum_dy_centred, const float* mean, const T* x,
                          const T* dy, int64_t width, int64_t rows) {
  for (int64_t start = 0; start < rows; start += kTileRows) {
    const int64_t end = min(rows, start + kTileRows);
    strips<2>(width, [&](int64_t j, auto count, auto lanes) BODY {
      constexpr int N = decltype(count)::value;
      VF32 m[N];
      Half64 tile_dy[2][N] = {}, tile_dy_centred[2][N] = {};  // lower and upper halves
      for (int v = 0; v < N; ++v) m[v] = LoadN(mean + j + v * kLanes, lanes);
      for (int64_t row = start; row < end; ++row) {
        for (int v = 0; v < N; ++v) {
          const int64_t at = row * width + j + v * kLanes;
          const VF32 d = LoadN(dy + at, lanes), centred = LoadN(x + at, lanes) - m[v];
          const Half64 lower = PromoteLowerTo(d), upper = PromoteUpperTo(d);
          tile_dy[0][v] += lower;
          tile_dy[1][v] += upper;
          tile_dy_centred[0][v] += lower * PromoteLowerTo(centred);
          tile_dy_centred[1][v] += upper * PromoteUpperTo(centred);
        }
      }
      for (int v = 0; v < N; ++v) {
        const int64_t column = j + v * kLanes;
        add_to(sum_dy + column, Combine(tile_dy[1][v], tile_dy[0][v]), lanes);
        add_to(sum_dy_centred + column, Combine(tile_dy_centred[1][v], tile_dy_centred[0][v]), lanes);
      }
    });
  }
}

// Writes dx = dy * scale + x_hat * slope + offset, where x_hat = (x - mean) * rstd. `factors` holds
// mean, rstd, scale, slope and offset, each for `width` columns.
template <class T>
static void write_gradient(T* dx, const T* x, const T* dy, const float* factors, int64_t width,
                           int64_t size, bool streamed) {
  const float *mean = factors, *rstd = mean + width, *scale = rstd + width;
  const float *slope = scale + width, *offset = slope + width;
  for_each_vector(size, [&](int, int64_t j, auto lanes) BODY {
    VF32 x_hat = (LoadN(x + j, lanes) - LoadN(mean + j, lanes)) * LoadN(rstd + j, lanes);
    VF32 correction = LoadN(slope + j, lanes) * x_hat + LoadN(offset + j, lanes);
    store_or_stream(dx + j, LoadN(dy + j, lanes) * LoadN(scale + j, lanes) + correction, lanes, streamed);
  });
}

template <class T>
static void columns_backward(const Backward& f, Pool& pool) {
  const Block b = f.block;
  const Matrix m(b);
  const T *x = static_cast<const T*>(f.x), *dy = static_cast<const T*>(f.dy);
  T* dx = static_cast<T*>(f.dx);
  const int64_t tasks = m.tasks(), slots = m.slots(tasks);
  const int64_t width = m.width, features = b.features();
  // For each slot: the factors of write_gradient, the sums of each chunk, and the sums of features.
  Scratch<float> floats(pool, slots * 5 * width);
  Scratch<double> chunk_sums(pool, slots * m.chunks * 2 * width), totals(pool, slots * 2 * features);
  if (!pool.memory) return;
  auto sums = [&](int64_t slot, int64_t chunk) {
    return chunk_sums + (slot * m.chunks + chunk) * 2 * width;
  };
  auto fill_columns = [&](int64_t slot, int64_t e) {
    float *mean = floats + slot * 5 * width, *rstd = mean + width;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t row = e * b.g + j % features / b.k;
      mean[j] = f.mean_high[row];
      rstd[j] = f.rstd[row];
    }
  };
  if (m.chunks > 1) parallel_for(pool, b.n, [&](int64_t e) { fill_columns(e, e); });
  auto measure = [&](int64_t slot, int64_t e, int64_t chunk) {
    if (m.chunks == 1) fill_columns(slot, e);
    double* sum_dy = sums(slot, chunk);
    for (int64_t i = 0; i < 2 * width; ++i) sum_dy[i] = 0;
    const int64_t at = e * b.example() + m.begin(chunk) * width;
    add_gradients(sum_dy, sum_dy + width, floats + slot * 5 * width, x + at, dy + at, width,
                  m.begin(chunk + 1) - m.begin(chunk));
  };
  auto finish_groups = [&](int64_t slot, int64_t e, int64_t begin, int64_t end) {
    float *scale = floats + (slot * 5 + 2) * width, *slope = scale + width, *offset = slope + width;
    for (int64_t g = begin; g < end; ++g) {
      const double mean = f.mean_high[e * b.g + g], mean_low = f.mean_low[e * b.g + g];
      const double rstd = f.rstd[e * b.g + g];
      double group_dy = 0, group_dy_xhat = 0;
      for (int64_t i = g * b.k; i < (g + 1) * b.k; ++i) {
        double feature_dy = 0, feature_dy_centred = 0;
        for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
          const double* from = sums(slot, chunk);
          for (int64_t j = i; j < width; j += features) {
            feature_dy += from[j];
            feature_dy_centred += from[width + j];
          }
        }
        for (int64_t row = m.rows * m.fold; row < b.s; ++row) {
          const int64_t at = e * b.example() + row * features + i;
          feature_dy += load_scalar(dy + at);
          feature_dy_centred += load_scalar(dy + at) * (load_scalar(x + at) - mean);
        }
        const double feature_dy_xhat = (feature_dy_centred - mean_low * feature_dy) * rstd;
        totals[slot * 2 * features + i] += feature_dy_xhat;
        totals[(slot * 2 + 1) * features + i] += feature_dy;
        const double factor = f.scale ? f.scale[i] : 1;
        group_dy += factor * feature_dy;
        group_dy_xhat += factor * feature_dy_xhat;
      }
      const double n = static_cast<double>(b.s) * b.k;
      const float group_slope = -rstd * group_dy_xhat / n;
      const float group_offset = -rstd * group_dy / n - mean_low * rstd * group_slope;
      for (int64_t i = g * b.k; i < (g + 1) * b.k; ++i) {
        const float dy_factor = rstd * (f.scale ? f.scale[i] : 1);
        for (int64_t j = i; j < width; j += features) {
          scale[j] = canonical_nan(dy_factor);
          slope[j] = canonical_nan(group_slope);
          offset[j] = canonical_nan(group_offset);
        }
      }
    }
  };
  auto write_chunk = [&](int64_t slot, int64_t e, int64_t chunk) {
    const float* factors = floats + slot * 5 * width;
    m.each_row(e, chunk, [&](int64_t at, int64_t size) {
      const bool streamed = should_stream(dx + at, f.elements);
      write_gradient(dx + at, x + at, dy + at, factors, width, size, streamed);
    });
  };
  m.each_example(pool, tasks, measure, finish_groups, write_chunk);
  if (!f.dscale && !f.dbias) return;
  for (int64_t i = 0; i < features; ++i) {
    double dscale = 0, dbias = 0;
    for (int64_t slot = 0; slot < slots; ++slot) {
      dscale += totals[slot * 2 * features + i];
      dbias += totals[(slot * 2 + 1) * features + i];
    }
    store_feature_gradients(f, i, dscale, dbias);
  }
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
