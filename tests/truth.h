// The norms of blocks in float64, by their formulas: the reference for the kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "norms.h"

namespace truth {

using Vector = std::vector<double>;

struct Inputs {
  jaxnorm::Block block;
  int64_t batch;
  double epsilon;
  bool subtract_mean;
  Vector x, scale, bias;  // x includes the residual; each block has a scale; all share one bias
  Vector backward_x, dy, d_residual_sum;  // backward_x is x as it was rounded for the backward pass
};

// A result, and the largest sum of absolute values of the terms of one of its elements.
struct Result {
  Vector value;
  double magnitude = 0;
};

struct Results {
  Result y, dx, dscale, dbias;
};

inline Results compute(const Inputs& a) {
  const jaxnorm::Block& b = a.block;
  const int64_t features = b.features(), size = a.x.size();
  Vector y(size), dx(size), dscale(a.batch * features), dbias(dscale), scale_terms(dscale), bias_terms(dscale);
  double y_magnitude = 0, dx_magnitude = 0;
  for (int64_t group = 0; group < a.batch * b.groups(); ++group) {
    const int64_t feature = group % b.g * b.k, params = group / b.groups() * features + feature;
    const int64_t start = group / b.g * b.example() + feature;
    // Calls body(at, k) for each element of the group, which is element `at` of the array.
    auto each = [&](auto body) {
      for (int64_t s = 0; s < b.s; ++s) {
        for (int64_t k = 0; k < b.k; ++k) body(start + s * features + k, k);
      }
    };
    const double count = static_cast<double>(b.s * b.k);
    double mean = 0, var = 0, mean_dy = 0, mean_dy_xhat = 0;
    if (a.subtract_mean) each([&](int64_t at, int64_t) { mean += a.x[at] / count; });
    each([&](int64_t at, int64_t) { var += (a.x[at] - mean) * (a.x[at] - mean) / count; });
    const double rstd = 1 / std::sqrt(var + a.epsilon);
    each([&](int64_t at, int64_t k) {
      const double scaled = (a.x[at] - mean) * rstd * a.scale[params + k], bias = a.bias[feature + k];
      const double x_hat = (a.backward_x[at] - mean) * rstd;
      y[at] = scaled + bias;
      y_magnitude = std::max(y_magnitude, std::fabs(scaled) + std::fabs(bias));
      dscale[params + k] += a.dy[at] * x_hat;
      dbias[params + k] += a.dy[at];
      scale_terms[params + k] += std::fabs(a.dy[at] * x_hat);
      bias_terms[params + k] += std::fabs(a.dy[at]);
      if (a.subtract_mean) mean_dy += a.dy[at] * a.scale[params + k] / count;
      mean_dy_xhat += a.dy[at] * a.scale[params + k] * x_hat / count;
    });
    each([&](int64_t at, int64_t k) {
      const double first = rstd * a.dy[at] * a.scale[params + k], second = rstd * mean_dy;
      const double third = rstd * (a.backward_x[at] - mean) * rstd * mean_dy_xhat;
      dx[at] = first - second - third + a.d_residual_sum[at];
      dx_magnitude = std::max(dx_magnitude, std::fabs(first) + std::fabs(second) + std::fabs(third) +
                                                std::fabs(a.d_residual_sum[at]));
    });
  }
  auto largest = [](const Vector& v) { return *std::max_element(v.begin(), v.end()); };
  return {{y, y_magnitude}, {dx, dx_magnitude}, {dscale, largest(scale_terms)}, {dbias, largest(bias_terms)}};
}

}  // namespace truth
