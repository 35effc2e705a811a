// The gradient of columns (columns.h).
#pragma once

#include "columns.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

// Adds, for each column, dy to `own` and dy * (x - mean) * rstd to `along`.
template <class T>
static void add_gradients(double* own, double* along, const float* mean, const float* rstd,
                          const T* x, const T* dy, int64_t width, int64_t rows) {
  for (int64_t start = 0; start < rows; start += kTileRows) {
    const int64_t n = smaller(kTileRows, rows - start);
    strips<2>(width, [&](int64_t j, auto count, auto lanes) BODY {
      constexpr int N = decltype(count)::value;
      const int64_t at = start * width + j;
      V m[N], r[N], sum_d[N] = {}, sum_dh[N] = {};
      for (int v = 0; v < N; ++v) {
        m[v] = load(mean + j + v * W, lanes);
        r[v] = load(rstd + j + v * W, lanes);
      }
      for (int64_t run = 0; run < n; run += kRunRows) {
        V run_d[N] = {}, run_dh[N] = {};
        for (int64_t row = run; row < smaller(n, run + kRunRows); ++row) {
          for (int v = 0; v < N; ++v) {
            V d = load(dy + at + row * width + v * W, lanes);
            V h = (load(x + at + row * width + v * W, lanes) - m[v]) * r[v];
            run_d[v] += d;
            run_dh[v] += d * h;
          }
        }
        for (int v = 0; v < N; ++v) sum_d[v] += run_d[v], sum_dh[v] += run_dh[v];
      }
      for (int v = 0; v < N; ++v) {
        const int64_t column = j + v * W;
        add(own + column, wide(sum_d[v]), lanes);
        add(along + column, wide(sum_dh[v]), lanes);
      }
    });
  }
}

// dx = dy * scale + h * along + own, where h = (x - mean) * rstd; `factors` holds, for `width`
// columns each, mean, rstd, scale, along, own.
template <class T>
static void write_gradient(T* dx, const T* x, const T* dy, const float* factors, int64_t width,
                           int64_t size, bool streamed) {
  const float *mean = factors, *rstd = mean + width, *scale = rstd + width;
  const float *along = scale + width, *own = along + width;
  sweep(size, [&](int, int64_t j, auto lanes) BODY {
    V h = (load(x + j, lanes) - load(mean + j, lanes)) * load(rstd + j, lanes);
    V centred = load(along + j, lanes) * h + load(own + j, lanes);
    write(dx + j, load(dy + j, lanes) * load(scale + j, lanes) + centred, lanes, streamed);
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
  // For each slot: mean, rstd, and the factors of dx; the sums of each chunk; those of features.
  Scratch<float> floats(slots * 5 * width);
  Scratch<double> chunk_sums(slots * m.chunks * 2 * width), totals(slots * 2 * features);
  auto sums = [&](int64_t slot, int64_t chunk) {
    return chunk_sums + (slot * m.chunks + chunk) * 2 * width;
  };
  auto spread = [&](int64_t slot, int64_t e) {
    float *mean = floats + slot * 5 * width, *rstd = mean + width;
    for (int64_t j = 0; j < width; ++j) {
      const int64_t row = e * b.g + j % features / b.k;
      mean[j] = f.mean[row];
      rstd[j] = f.rstd[row];
    }
  };
  if (m.chunks > 1) parallel(pool, b.n, [&](int64_t e) { spread(e, e); });
  auto measure = [&](int64_t slot, int64_t e, int64_t chunk) {
    if (m.chunks == 1) spread(slot, e);
    double* own = sums(slot, chunk);
    for (int64_t i = 0; i < 2 * width; ++i) own[i] = 0;
    const float *mean = floats + slot * 5 * width, *rstd = mean + width;
    const int64_t at = e * b.example() + m.begin(chunk) * width;
    add_gradients(own, own + width, mean, rstd, x + at, dy + at, width,
                  m.begin(chunk + 1) - m.begin(chunk));
  };
  auto finish_groups = [&](int64_t slot, int64_t e, int64_t begin, int64_t end) {
    float *scale = floats + (slot * 5 + 2) * width, *along = scale + width, *own = along + width;
    for (int64_t g = begin; g < end; ++g) {
      const double mean = f.mean[e * b.g + g], rest = f.rest[e * b.g + g];
      const double rstd = f.rstd[e * b.g + g];
      double group_own = 0, group_along = 0;
      for (int64_t i = g * b.k; i < (g + 1) * b.k; ++i) {
        double d = 0, dh = 0;
        for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
          const double* from = sums(slot, chunk);
          for (int64_t j = i; j < width; j += features) {
            d += from[j];
            dh += from[width + j];
          }
        }
        for (int64_t row = m.rows * m.fold; row < b.s; ++row) {
          const int64_t at = e * b.example() + row * features + i;
          d += get(dy + at);
          dh += get(dy + at) * ((get(x + at) - mean) * rstd);
        }
        dh -= rest * rstd * d;
        totals[slot * 2 * features + i] += dh;
        totals[(slot * 2 + 1) * features + i] += d;
        const double factor = f.scale ? f.scale[i] : 1;
        group_own += factor * d;
        group_along += factor * dh;
      }
      const double n = static_cast<double>(b.s) * b.k;
      const float of_h = -rstd * group_along / n, of_one = -rstd * group_own / n - rest * rstd * of_h;
      for (int64_t i = g * b.k; i < (g + 1) * b.k; ++i) {
        const float of_d = rstd * (f.scale ? f.scale[i] : 1);
        for (int64_t j = i; j < width; j += features) {
          scale[j] = plain(of_d);
          along[j] = plain(of_h);
          own[j] = plain(of_one);
        }
      }
    }
  };
  auto write_chunk = [&](int64_t slot, int64_t e, int64_t chunk) {
    const float* factors = floats + slot * 5 * width;
    const int64_t elements = b.n * b.example();
    m.each_row(e, chunk, [&](int64_t at, int64_t size) {
      write_gradient(dx + at, x + at, dy + at, factors, width, size, streams(dx + at, elements));
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
    put(f, i, dscale, dbias);
  }
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
