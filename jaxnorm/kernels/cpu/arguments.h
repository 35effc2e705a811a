// The arguments of XLA's FFI calls: checks, and pointers to the parts of arrays.
#pragma once

#include <string>

#include "norms.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxnorm {
namespace {

using Float32 = ffi::Buffer<ffi::F32>;

ffi::Error invalid(const std::string& argument) {
  return ffi::Error::InvalidArgument("jaxnorm's kernel got " + argument);
}

bool has_size(const Float32& buffer, int64_t size) {
  return static_cast<int64_t>(buffer.element_count()) == size;
}

// An absent argument, or a result that is not computed, is an empty array.
bool has_size_or_none(const Float32& buffer, int64_t size) {
  return has_size(buffer, 0) || has_size(buffer, size);
}

// Whether an array is empty, or has the size and type of x.
bool like_or_none(const ffi::AnyBuffer& a, const ffi::AnyBuffer& x) {
  return a.element_count() == 0 ||
         (a.element_count() == x.element_count() && a.element_type() == x.element_type());
}

template <class Buffer>
auto* data_or_null(Buffer& buffer, int64_t offset = 0) {
  return buffer.element_count() ? buffer.typed_data() + offset : nullptr;
}

// A pointer to a byte of an array that is like x, or null.
char* data_or_null_at(const ffi::AnyBuffer& a, int64_t offset) {
  return a.element_count() ? static_cast<char*>(a.untyped_data()) + offset : nullptr;
}

ffi::Error check(const ffi::AnyBuffer& x, const Block& block, int64_t batch) {
  if (batch < 1 || block.n < 1 || block.s < 1 || block.g < 1 || block.k < 1) {
    return invalid("a block with an empty axis");
  }
  int64_t size = batch;
  for (int64_t axis : {block.n, block.s, block.g, block.k}) {
    if (__builtin_mul_overflow(size, axis, &size)) return invalid("a block that is too large");
  }
  if (static_cast<int64_t>(x.element_count()) != size) {
    return invalid("an array that is not its block");
  }
  if (x.element_type() != ffi::F32 && x.element_type() != ffi::BF16) {
    return invalid("elements that are neither float32 nor bfloat16");
  }
  return ffi::Error::Success();
}

Element element_of(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F32 ? Element::kFloat32 : Element::kBfloat16;
}

// Whether all blocks share one scale (or bias), or each has its own, or there is none.
bool fits_blocks(const Float32& param, const Block& block, int64_t batch) {
  return has_size_or_none(param, block.features()) || has_size(param, batch * block.features());
}

// The scale or bias of block i, or null.
const float* param_of(const Float32& param, const Block& block, int64_t i) {
  const bool shared = static_cast<int64_t>(param.element_count()) == block.features();
  return data_or_null(param, shared ? 0 : i * block.features());
}

}  // namespace
}  // namespace jaxnorm
