// Mean and variance, centred twice (docs/numerics.md).
//
// Elements are taken in tiles that stay in the first cache. Of each are taken the sums of d = x - m
// and of d * d, which lose nothing to a large mean: m is the mean of the tiles before, rounded. (So
// the squares of what tiles are apart are at most twice those of which the variance consists.) The
// first tile is read twice, once for its own mean. Tiles are put together in float64, as distances
// from that.
#pragma once

#include "simd.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

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
  float mean, rest, var, rstd;
};

static inline Moment finish(const Sums& sums, double epsilon, bool centred) {
  Moment result = {};
  double var = sums.second / sums.count;
  if (centred) {
    double beyond = sums.first / sums.count;
    result.mean = static_cast<float>(sums.origin + beyond);
    result.rest = static_cast<float>((sums.origin - result.mean) + beyond);
    var -= beyond * beyond;
    if (var < 0) var = 0;  // NaN stays NaN
  }
  result.var = static_cast<float>(var);
  double padded = static_cast<double>(result.var) + epsilon;
  result.rstd = padded > 0 ? static_cast<float>(1 / __builtin_sqrt(padded)) : padded <= 0 ? 0 : __builtin_nanf("");
  return result;
}

// Element by element in float64, for what overflows otherwise. `at(i)` is the i-th of n.
template <class At>
static __attribute__((noinline)) Sums wide_sums(int64_t n, bool centred, At at) {
  double total = 0, first = 0, second = 0;
  for (int64_t i = 0; centred && i < n; ++i) total += at(i);
  double mean = static_cast<float>(total / n);
  for (int64_t i = 0; i < n; ++i) {
    double d = at(i) - mean;
    first += d;
    second += d * d;
  }
  return {static_cast<double>(n), mean, first, second};
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
