// All kernels; compiled once for each target.
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
  const bool columns = f.dscale || f.dbias;
  if (f.scale && columns) return rows_backward<kSubtractMean, true, true, T>(f, pool);
  if (f.scale) return rows_backward<kSubtractMean, true, false, T>(f, pool);
  if (columns) return rows_backward<kSubtractMean, false, true, T>(f, pool);
  rows_backward<kSubtractMean, false, false, T>(f, pool);
}

template <class T>
static void forward_of(const Forward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_forward<T>(f, pool);
  f.subtract_mean ? forward<true, T>(f, pool) : forward<false, T>(f, pool);
}

template <class T>
static void backward_of(const Backward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_backward<T>(f, pool);
  f.subtract_mean ? backward<true, T>(f, pool) : backward<false, T>(f, pool);
}

static void any_forward(Element element, const Forward& f, Pool& pool) {
  element == Element::kFloat32 ? forward_of<float>(f, pool) : forward_of<bfloat16>(f, pool);
}

static void any_backward(Element element, const Backward& f, Pool& pool) {
  element == Element::kFloat32 ? backward_of<float>(f, pool) : backward_of<bfloat16>(f, pool);
}

}  // namespace JAXNORM_TARGET

#define JAXNORM_TEXT(name) JAXNORM_TEXT_OF(name)
#define JAXNORM_TEXT_OF(name) #name

extern const Target JAXNORM_NAME = {JAXNORM_TEXT(JAXNORM_TARGET), JAXNORM_TARGET::any_forward,
                                   JAXNORM_TARGET::any_backward};

}  // namespace jaxnorm
