// All kernels of a target. This file is compiled once for each target.
#include "columns.h"
#include "columns_backward.h"
#include "rows_backward.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

// Whether the elements of a group are contiguous in memory.
static bool is_rows(const Block& block) { return block.s == 1; }

template <bool kSubtractMean, class T>
static void forward(const Forward& f, Pool& pool) {
  if (f.scale && f.bias) return rows_forward<kSubtractMean, true, true, T>(f, pool);
  if (f.scale) return rows_forward<kSubtractMean, true, false, T>(f, pool);
  if (f.bias) return rows_forward<kSubtractMean, false, true, T>(f, pool);
  rows_forward<kSubtractMean, false, false, T>(f, pool);
}

template <bool kSubtractMean, class T>
static void backward(const Backward& f, Pool& pool) {
  const bool param_grads = f.dscale || f.dbias;
  if (f.scale && param_grads) return rows_backward<kSubtractMean, true, true, T>(f, pool);
  if (f.scale) return rows_backward<kSubtractMean, true, false, T>(f, pool);
  if (param_grads) return rows_backward<kSubtractMean, false, true, T>(f, pool);
  rows_backward<kSubtractMean, false, false, T>(f, pool);
}

template <class T>
static void forward_elements(const Forward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_forward<T>(f, pool);
  f.subtract_mean ? forward<true, T>(f, pool) : forward<false, T>(f, pool);
}

template <class T>
static void backward_elements(const Backward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_backward<T>(f, pool);
  f.subtract_mean ? backward<true, T>(f, pool) : backward<false, T>(f, pool);
}

static void forward_any_type(Element element, const Forward& f, Pool& pool) {
  element == Element::kFloat32 ? forward_elements<float>(f, pool) : forward_elements<bfloat16>(f, pool);
}

static void backward_any_type(Element element, const Backward& f, Pool& pool) {
  element == Element::kFloat32 ? backward_elements<float>(f, pool) : backward_elements<bfloat16>(f, pool);
}

}  // namespace JAXNORM_TARGET

#define JAXNORM_TEXT(name) JAXNORM_TEXT_OF(name)
#define JAXNORM_TEXT_OF(name) #name

extern const Target JAXNORM_NAME = {JAXNORM_TEXT(JAXNORM_TARGET), JAXNORM_TARGET::forward_any_type,
                                   JAXNORM_TARGET::backward_any_type};

}  // namespace jaxnorm
