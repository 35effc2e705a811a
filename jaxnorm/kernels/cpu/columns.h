// Norms of columns: the elements of a group are not contiguous in memory.
//
// An example is a matrix of s rows and g * k columns. If the columns don't fill one vector, `fold`
// rows are treated as one longer row, and its columns are merged at the end. The remaining rows are
// treated one by one.
#pragma once

#include "moments.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

constexpr int64_t kTileRows = 64;    // A tile stays in the first-level cache. It is added in float32:
constexpr int64_t kRunRows = 8;      // first runs of this length, then their sums (moments.h).
constexpr int64_t kChunkRows = 256;  // The least, so that the sums of a chunk are small beside it.

struct Matrix {
  Block block;
  int64_t fold = 1, width, rows, chunks;

  explicit Matrix(const Block& b) : block(b) {
    while (b.features() < kLanes && fold * b.features() % kLanes) fold *= 2;
    width = fold * b.features();
    rows = b.s / fold;
    chunks = num_tasks(b.example(), max(1, rows / kChunkRows));
  }

  int64_t begin(int64_t chunk) const { return rows * chunk / chunks; }
  // Calls body(start, size) for each row of a chunk. The last chunk has the remaining rows too.
  template <class Body>
  void each_row(int64_t e, int64_t chunk, Body body) const {
    const int64_t example = e * block.example(), features = block.features();
    for (int64_t r = begin(chunk); r < begin(chunk + 1); ++r) body(example + r * width, width);
    if (chunk + 1 < chunks) return;
    for (int64_t r = rows * fold; r < block.s; ++r) body(example + r * features, features);
  }

  // The number of tasks for examples of one chunk. Each task has a slot of memory, some bytes per
  // column, so each task gets enough rows to make the slot small beside them.
  int64_t tasks() const {
    const int64_t limit = max(4, block.n * block.s / (2 * kChunkRows));
    return num_tasks(block.n * block.example(), min(block.n, limit));
  }
  int64_t slots(int64_t tasks) const { return chunks == 1 ? tasks : block.n; }

  // Measures each example, finishes the statistics of its groups, and writes its result. A slot holds
  // the data that these steps share. A small example stays in the cache and in one thread, and the
  // next example reuses its slot. Large examples are divided into chunks of rows.
  template <class Measure, class Finish, class Write>
  void each_example(Pool& pool, int64_t tasks, Measure measure, Finish finish, Write write) const {
    const int64_t n = block.n, parts = chunks;
    if (parts == 1) {
      parallel_for(pool, tasks, [&](int64_t slot) {
        for (int64_t e = n * slot / tasks; e < n * (slot + 1) / tasks; ++e) {
          measure(slot, e, 0);
          finish(slot, e, 0, block.g);
          write(slot, e, 0);
        }
      });
    } else {
      parallel_for(pool, n * parts, [&](int64_t i) { measure(i / parts, i / parts, i % parts); });
      parallel_for(pool, n * parts, [&](int64_t i) {
        const int64_t part = i % parts;
        finish(i / parts, i / parts, block.g * part / parts, block.g * (part + 1) / parts);
      });
      // In reverse order: the rows that were read last may still be in the cache.
      parallel_for(pool, n * parts, [&](int64_t i) {
        const int64_t last = n * parts - 1 - i;
        write(last / parts, last / parts, last % parts);
      });
    }
  }
};

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(j, count, lanes) for strips of columns: strips of M vectors, then of one.
template <int M, class Body>
static inline BODY void strips(int64_t width, Body body) {
  int64_t j = 0;
  for (; j + M * kLanes <= width; j += M * kLanes) body(j, Count<M>(), Whole());
  for (; j + kLanes <= width; j += kLanes) body(j, Count<1>(), Whole());
  if (j < width) body(j, Count<1>(), Tail{width - j});
}

// Adds rows to the sums of each column, which are two doubles and an origin (Sums in moments.h).
template <class T>
static void add_rows(float* origin, double* first, double* second, const T* x, int64_t width,
                     int64_t rows) {
  for (int64_t start = 0; start < rows; start += kTileRows) {
    const int64_t n = min(kTileRows, rows - start);
    const double tile_rows = n, previous_rows = start;
    strips<4>(width, [&](int64_t j, auto count, auto lanes) BODY {
      constexpr int N = decltype(count)::value;
      const T* from = x + start * width + j;
      VF32 pivot[N] = {}, d1[N] = {}, d2[N] = {};
      for (int64_t r = 0; start == 0 && r < n; ++r) {
        for (int v = 0; v < N; ++v) pivot[v] += LoadN(from + r * width + v * kLanes, lanes);
      }
      for (int v = 0; v < N; ++v) {
        const int64_t at = j + v * kLanes;
        pivot[v] = start == 0 ? pivot[v] / static_cast<float>(n)
                              : DemoteTo(PromoteTo(LoadN(origin + at, lanes)) +
                                         LoadN(first + at, lanes) / previous_rows);
      }
      for (int64_t run = 0; run < n; run += kRunRows) {
        VF32 run1[N] = {}, run2[N] = {};
        for (int64_t r = run; r < min(n, run + kRunRows); ++r) {
          for (int v = 0; v < N; ++v) {
            VF32 d = LoadN(from + r * width + v * kLanes, lanes) - pivot[v];
            run1[v] += d;
            run2[v] += d * d;
          }
        }
        for (int v = 0; v < N; ++v) d1[v] += run1[v], d2[v] += run2[v];
      }
      for (int v = 0; v < N; ++v) {
        const int64_t at = j + v * kLanes;
        if (start == 0) StoreN(origin + at, pivot[v], lanes);
        const VF64 shift = PromoteTo(pivot[v]) - PromoteTo(LoadN(origin + at, lanes));
        const VF64 d = PromoteTo(d1[v]);
        add_to(first + at, d + tile_rows * shift, lanes);
        add_to(second + at, PromoteTo(d2[v]) + shift * (2 * d + tile_rows * shift), lanes);
      }
    });
  }
}

template <class T>
static void write_row(T* y, const T* x, const float* mean, const float* scale, const float* bias,
                      int64_t size, bool streamed) {
  for_each_vector(size, [&](int, int64_t j, auto lanes) BODY {
    VF32 d = LoadN(x + j, lanes) - LoadN(mean + j, lanes);
    store_or_stream(y + j, d * LoadN(scale + j, lanes) + LoadN(bias + j, lanes), lanes, streamed);
  });
}

template <class T>
static void columns_forward(const Forward& f, Pool& pool) {
  const Block b = f.block;
  const Matrix m(b);
  const T* x = static_cast<const T*>(f.x);
  T* y = static_cast<T*>(f.y);
  const int64_t tasks = m.tasks(), slots = m.slots(tasks);
  const int64_t width = m.width, features = b.features();
  Scratch<float> floats(pool, slots * (m.chunks + 3) * width);
  Scratch<double> doubles(pool, slots * m.chunks * 2 * width);
  if (!pool.memory) return;
  auto origin = [&](int64_t slot, int64_t chunk) {
    return floats + (slot * (m.chunks + 3) + chunk) * width;
  };
  auto sums = [&](int64_t slot, int64_t chunk) {
    return doubles + (slot * m.chunks + chunk) * 2 * width;
  };
  auto measure = [&](int64_t slot, int64_t e, int64_t chunk) {
    double* first = sums(slot, chunk);
    for (int64_t i = 0; i < 2 * width; ++i) first[i] = 0;
    add_rows(origin(slot, chunk), first, first + width, x + e * b.example() + m.begin(chunk) * width,
             width, m.begin(chunk + 1) - m.begin(chunk));
  };
  auto group_sums = [&](int64_t slot, int64_t e, int64_t feature) {
    const T* from = x + e * b.example() + feature;
    Sums total = {};
    for (int64_t chunk = 0; chunk < m.chunks; ++chunk) {
      const double n = m.begin(chunk + 1) - m.begin(chunk);
      const float* pivot = origin(slot, chunk);
      const double *first = sums(slot, chunk), *second = first + width;
      if (n == 0) continue;
      for (int64_t j = feature; j < width; j += features) {
        for (int64_t i = j; i < j + b.k; ++i) total.add(n, pivot[i], first[i], second[i]);
      }
    }
    for (int64_t row = m.rows * m.fold; row < b.s; ++row) {
      for (int64_t i = 0; i < b.k; ++i) total.add(1, load_scalar(from + row * features + i), 0, 0);
    }
    if (__builtin_isfinite(total.second)) return total;
    return wide_sums(b.s * b.k, true, [=](int64_t i) {
      return static_cast<double>(load_scalar(from + i / b.k * features + i % b.k));
    });
  };
  auto finish_groups = [&](int64_t slot, int64_t e, int64_t begin, int64_t end) {
    float* mean = origin(slot, m.chunks);
    float *scale = mean + width, *bias = scale + width;
    for (int64_t g = begin; g < end; ++g) {
      const int64_t row = e * b.g + g;
      Moment moment = finish(group_sums(slot, e, g * b.k), f.epsilon, true);
      f.stats.mean_high[row] = moment.mean_high;
      f.stats.mean_low[row] = moment.mean_low;
      f.stats.var[row] = moment.var;
      f.stats.rstd[row] = moment.rstd;
      for (int64_t i = g * b.k; i < (g + 1) * b.k; ++i) {
        const float factor = f.scale ? f.scale[i] : 1;
        for (int64_t j = i; j < width; j += features) {
          mean[j] = moment.mean_high;
          scale[j] = canonical_nan(moment.rstd * factor);
          bias[j] = canonical_nan((f.bias ? f.bias[i] : 0) - moment.mean_low * scale[j]);
        }
      }
    }
  };
  auto write_chunk = [&](int64_t slot, int64_t e, int64_t chunk) {
    const float* mean = origin(slot, m.chunks);
    const float *scale = mean + width, *bias = scale + width;
    m.each_row(e, chunk, [&](int64_t at, int64_t size) {
      write_row(y + at, x + at, mean, scale, bias, size, should_stream(y + at, f.elements));
    });
  };
  m.each_example(pool, tasks, measure, finish_groups, write_chunk);
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
