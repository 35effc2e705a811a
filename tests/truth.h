// The norms of blocks in float64, by their formulas, to compare the kernel with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "norms.h"

namespace truth {

using Vector = std::vector<double>;

struct Given {
  jaxnorm::Block block;
  int64_t batch;
  double epsilon;
  bool subtract_mean;
  Vector x, scale, bias;       // x: with its residual; scale: of each block; bias: of all
  Vector rounded, dy, d_residual_sum;  // rounded: the x of the backward pass
};

// A result, and the largest sum of absolute values of what one of its elements is the sum of.
struct Result {
  Vector value;
  double magnitude = 0;
};

struct Results {
  Result y, dx, dscale, dbias;
};

inline Results compute(const Given& a) {
  const jaxnorm::Block& b = a.block;
  const int64_t features = b.features(), size = a.x.size();
  Vector y(size), dx(size), dscale(a.batch * features), dbias(dscale), scale_terms(dscale), bias_terms(dscale);
  double of_y = 0, of_dx = 0;
  for (int64_t group = 0; group < a.batch * b.groups(); ++group) {
    const int64_t feature = group % b.g * b.k, params = group / b.groups() * features + feature;
    const int64_t start = group / b.g * b.example() + feature;
    // body(at, k) for each element of the group.
    auto each = [&](auto body) {
      for (int64_t s = 0; s < b.s; ++s) {
        for (int64_t k = 0; k < b.k; ++k) body(start + s * features + k, k);
      }
    };
    const double count = static_cast<double>(b.s * b.k);
    double mean = 0, var = 0, own = 0, along = 0;
    if (a.subtract_mean) each([&](int64_t at, int64_t) { mean += a.x[at] / count; });
    each([&](int64_t at, int64_t) { var += (a.x[at] - mean) * (a.x[at] - mean) / count; });
    const double rstd = 1 / std::sqrt(var + a.epsilon);
    each([&](int64_t at, int64_t k) {
      const double scaled = (a.x[at] - mean) * rstd * a.scale[params + k], bias = a.bias[feature + k];
      const double h = (a.rounded[at] - mean) * rstd;
      y[at] = scaled + bias;
      of_y = std::max(of_y, std::fabs(scaled) + std::fabs(bias));
      dscale[params + k] += a.dy[at] * h;
      dbias[params + k] += a.dy[at];
      scale_terms[params + k] += std::fabs(a.dy[at] * h);
      bias_terms[params + k] += std::fabs(a.dy[at]);
      if (a.subtract_mean) own += a.dy[at] * a.scale[params + k] / count;
      along += a.dy[at] * a.scale[params + k] * h / count;
    });
    each([&](int64_t at, int64_t k) {
      const double first = rstd * a.dy[at] * a.scale[params + k], second = rstd * own;
      const double third = rstd * (a.rounded[at] - mean) * rstd * along;
      dx[at] = first - second - third + a.d_residual_sum[at];
      of_dx = std::max(of_dx, std::fabs(first) + std::fabs(second) + std::fabs(third) + std::fabs(a.d_residual_sum[at]));
    });
  }
  auto largest = [](const Vector& v) { return *std::max_element(v.begin(), v.end()); };
  return {{y, of_y}, {dx, of_dx}, {dscale, largest(scale_terms)}, {dbias, largest(bias_terms)}};
}

}  // namespace truth
