// Mean and variance, with the mean subtracted twice (docs/numerics.md).
//
// Elements are summed in tiles that stay in the first-level cache. A tile has the sums of d = x - m
// and of d * d, where m is the rounded mean of the previous tiles, so that a large mean costs no
// digits. (The squares of the distances between tiles are at most twice the squares of the variance.)
// The first tile is read twice, once for its own mean. The sums of tiles are merged in float64, as
// distances from the mean of the first tile.
//
// Only short runs of a tile are added in float32. After a large element, each further addition rounds
// by up to half a unit of the sum so far. Where the elements are alike, it always rounds in the same
// direction: n additions cost up to n / 4 units of rstd.
#pragma once

#include "schedule.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

// Sums over `count` elements of x - origin and of its square.
struct Sums {
  double count, origin, first, second;

  void add(double n, double pivot, double d, double d_squared) {
    if (count == 0) origin = pivot;
    double shift = pivot - origin;
    count += n;
    first += d + n * shift;
    second += d_squared + shift * (2 * d + n * shift);
  }

  float mean() const { return static_cast<float>(origin + first / count); }

  void add(const Sums& other) {
    if (other.count > 0) add(other.count, other.origin, other.first, other.second);
  }
};

struct Moment {
  float mean_high, mean_low, var, rstd;
};

static inline Moment finish(const Sums& sums, double epsilon, bool subtract_mean) {
  Moment result = {};
  double var = sums.second / sums.count;
  if (subtract_mean) {
    double offset = sums.first / sums.count;  // mean - origin
    result.mean_high = static_cast<float>(sums.origin + offset);
    result.mean_low = static_cast<float>((sums.origin - result.mean_high) + offset);
    var -= offset * offset;
    if (var < 0) var = 0;  // NaN stays NaN
  }
  result.var = static_cast<float>(var);
  double padded = static_cast<double>(result.var) + epsilon;
  result.rstd = padded > 0    ? static_cast<float>(1 / __builtin_sqrt(padded))
                : padded <= 0 ? 0
                              : __builtin_nanf("");
  return result;
}

// The sums in float64, for data whose squares overflow float32. `at(i)` is element i of n.
template <class At>
static __attribute__((noinline)) Sums wide_sums(int64_t n, bool subtract_mean, At at) {
  double total = 0, first = 0, second = 0;
  for (int64_t i = 0; subtract_mean && i < n; ++i) total += at(i);
  double mean = static_cast<float>(total / n);
  for (int64_t i = 0; i < n; ++i) {
    double d = at(i) - mean;
    first += d;
    second += d * d;
  }
  return {static_cast<double>(n), mean, first, second};
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
