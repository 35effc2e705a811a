// All kernels, compiled once for each level of the machine.
#include "columns.h"
#include "columns_backward.h"
#include "rows_backward.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

// Rows, where the elements of a group stand side by side.
static bool is_rows(const Block& block) { return block.s == 1; }

template <bool kCentred, class T>
static void forward(const Forward& f, Pool& pool) {
  if (f.scale && f.bias) return rows_forward<kCentred, true, true, T>(f, pool);
  if (f.scale) return rows_forward<kCentred, true, false, T>(f, pool);
  if (f.bias) return rows_forward<kCentred, false, true, T>(f, pool);
  rows_forward<kCentred, false, false, T>(f, pool);
}

template <bool kCentred, class T>
static void backward(const Backward& f, Pool& pool) {
  const bool columns = f.dscale || f.dbias;
  if (f.scale && columns) return rows_backward<kCentred, true, true, T>(f, pool);
  if (f.scale) return rows_backward<kCentred, true, false, T>(f, pool);
  if (columns) return rows_backward<kCentred, false, true, T>(f, pool);
  rows_backward<kCentred, false, false, T>(f, pool);
}

template <class T>
static void forward_of(const Forward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_forward<T>(f, pool);
  f.centred ? forward<true, T>(f, pool) : forward<false, T>(f, pool);
}

template <class T>
static void backward_of(const Backward& f, Pool& pool) {
  if (!is_rows(f.block)) return columns_backward<T>(f, pool);
  f.centred ? backward<true, T>(f, pool) : backward<false, T>(f, pool);
}

static void any_forward(Element element, const Forward& f, Pool& pool) {
  element == Element::kFloat32 ? forward_of<float>(f, pool) : forward_of<bfloat16>(f, pool);
}

static void any_backward(Element element, const Backward& f, Pool& pool) {
  element == Element::kFloat32 ? backward_of<float>(f, pool) : backward_of<bfloat16>(f, pool);
}

}  // namespace JAXNORM_LEVEL

#define JAXNORM_TEXT(name) JAXNORM_TEXT_OF(name)
#define JAXNORM_TEXT_OF(name) #name

extern const Level JAXNORM_NAME = {JAXNORM_TEXT(JAXNORM_LEVEL), JAXNORM_LEVEL::any_forward,
                                   JAXNORM_LEVEL::any_backward};

}  // namespace jaxnorm
