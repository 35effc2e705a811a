// XLA's FFI calls: checked, and passed to the best target that runs on this machine.
#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "blocks.h"
#include "norms.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxnorm {
namespace {

const Target* const kTargets[] = {
#if defined(JAXNORM_AVX512)
    &kAvx512,
#endif
#if defined(JAXNORM_AVX2)
    &kAvx2,
#endif
    &kBaseline,
};

bool runs_here([[maybe_unused]] const Target& target) {
#if defined(JAXNORM_AVX2)
  if (&target == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(JAXNORM_AVX512)
  // Processors without VBMI2 lower their clock for vectors of 512 bits.
  if (&target == &kAvx512) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
  }
#endif
  return true;
}

const Target* best_target() {
  for (const Target* target : kTargets) {
    if (runs_here(*target)) return target;
  }
  return &kBaseline;
}

std::atomic<const Target*> target_in_use{best_target()};

ffi::Error wrong(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxnorm's kernel was given " + what);
}

bool holds(const ffi::Buffer<ffi::F32>& buffer, int64_t size) {
  return static_cast<int64_t>(buffer.element_count()) == size;
}

// An array that is missing, or not wanted, is empty.
bool fits(const ffi::Buffer<ffi::F32>& buffer, int64_t size) {
  return holds(buffer, 0) || holds(buffer, size);
}

// An array like x, or none.
bool like_or_none(const ffi::AnyBuffer& a, const ffi::AnyBuffer& x) {
  return a.element_count() == 0 ||
         (a.element_count() == x.element_count() && a.element_type() == x.element_type());
}

template <class Buffer>
auto* data_or_null(Buffer& buffer, int64_t offset = 0) {
  return buffer.element_count() ? buffer.typed_data() + offset : nullptr;
}

// An array like x, from some byte on.
char* part_of(const ffi::AnyBuffer& a, int64_t offset) {
  return a.element_count() ? static_cast<char*>(a.untyped_data()) + offset : nullptr;
}

ffi::Error check(const ffi::AnyBuffer& x, const Block& block, int64_t batch) {
  if (batch < 1 || block.n < 1 || block.s < 1 || block.g < 1 || block.k < 1) {
    return wrong("a block with an empty axis");
  }
  int64_t size = batch;
  for (int64_t axis : {block.n, block.s, block.g, block.k}) {
    if (__builtin_mul_overflow(size, axis, &size)) return wrong("a block that is too large");
  }
  if (static_cast<int64_t>(x.element_count()) != size) {
    return wrong("an array that is not its block");
  }
  if (x.element_type() != ffi::F32 && x.element_type() != ffi::BF16) {
    return wrong("elements that are neither float32 nor bfloat16");
  }
  return ffi::Error::Success();
}

Element element_of(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F32 ? Element::kFloat32 : Element::kBfloat16;
}

template <class... Arguments>
ffi::Error run_blocks(Arguments&&... arguments) {
  try {
    each_block(std::forward<Arguments>(arguments)...);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxnorm's kernel: out of memory");
  }
}

using Float32 = ffi::Buffer<ffi::F32>;

// The scale or bias of a block: all have the same, or each has its own.
bool fits_blocks(const Float32& param, const Block& block, int64_t batch) {
  return fits(param, block.features()) || holds(param, batch * block.features());
}

const float* param_of(const Float32& param, const Block& block, int64_t i) {
  const bool shared = static_cast<int64_t>(param.element_count()) == block.features();
  return data_or_null(param, shared ? 0 : i * block.features());
}

// `batch` such blocks, which may each have a scale and bias.
ffi::Error forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer residual, Float32 scale,
                   Float32 bias, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> residual_sum,
                   ffi::Result<Float32> mean_high, ffi::Result<Float32> mean_low,
                   ffi::Result<Float32> var, ffi::Result<Float32> rstd, int64_t batch,
                   int64_t n, int64_t s, int64_t g, int64_t k, double epsilon, bool subtract_mean) {
  const Block block = {n, s, g, k};
  if (ffi::Error error = check(x, block, batch); error.failure()) return error;
  const int64_t groups = block.groups(), means = subtract_mean ? batch * groups : 0;
  if (!holds(*mean_high, means) || !holds(*mean_low, means) || !holds(*var, batch * groups) ||
      !holds(*rstd, batch * groups)) {
    return wrong("statistics of another size");
  }
  if (!fits_blocks(scale, block, batch) || !fits_blocks(bias, block, batch)) {
    return wrong("a scale or bias of another size");
  }
  if (y->element_count() != x.element_count() || y->element_type() != x.element_type()) {
    return wrong("a result unlike x");
  }
  const bool has_residual = residual.element_count() > 0;
  if (!like_or_none(residual, x) || !like_or_none(*residual_sum, x) || has_residual != (residual_sum->element_count() > 0)) {
    return wrong("a residual or a residual_sum unlike x");
  }
  if (has_residual && (s > 1 || (k > kLongestSum && x.element_type() == ffi::BF16))) {
    return wrong("a residual for columns or for long rows of bfloat16");
  }
  const int64_t elements = x.element_count(), bytes = x.size_bytes() / batch;
  const Target* target = target_in_use;
  return run_blocks(threads, batch, elements, [&](int64_t i, Pool& pool) {
    Forward call = {block,
                    elements,
                    epsilon,
                    subtract_mean,
                    part_of(x, i * bytes),
                    part_of(residual, i * bytes),
                    param_of(scale, block, i),
                    param_of(bias, block, i),
                    part_of(*y, i * bytes),
                    part_of(*residual_sum, i * bytes),
                    {data_or_null(*mean_high, i * groups), data_or_null(*mean_low, i * groups),
                     data_or_null(*var, i * groups), data_or_null(*rstd, i * groups)}};
    target->forward(element_of(x), call, pool);
  });
}

// `batch` such blocks, each with its own dscale and dbias.
ffi::Error backward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                    ffi::AnyBuffer d_residual_sum, Float32 scale, Float32 mean_high, Float32 mean_low,
                    Float32 rstd, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Float32> dscale,
                    ffi::Result<Float32> dbias, int64_t batch, int64_t n, int64_t s, int64_t g,
                    int64_t k, bool subtract_mean) {
  const Block block = {n, s, g, k};
  if (ffi::Error error = check(x, block, batch); error.failure()) return error;
  const int64_t groups = block.groups(), means = subtract_mean ? batch * groups : 0;
  if (!holds(mean_high, means) || !holds(mean_low, means) || !holds(rstd, batch * groups)) {
    return wrong("statistics of another size");
  }
  if (!fits_blocks(scale, block, batch) || !fits(*dscale, batch * block.features()) ||
      !fits(*dbias, batch * block.features())) {
    return wrong("a scale or bias of another size");
  }
  for (const ffi::AnyBuffer& like : {dy, *dx}) {
    if (like.element_count() != x.element_count() || like.element_type() != x.element_type()) {
      return wrong("a gradient unlike x");
    }
  }
  if (!like_or_none(d_residual_sum, x) || (d_residual_sum.element_count() > 0 && s > 1)) {
    return wrong("a gradient of the residual_sum unlike x, or for columns");
  }
  const int64_t elements = x.element_count(), bytes = x.size_bytes() / batch;
  const Target* target = target_in_use;
  return run_blocks(threads, batch, elements, [&](int64_t i, Pool& pool) {
    const int64_t feature = i * block.features();
    Backward call = {block,
                     elements,
                     subtract_mean,
                     part_of(x, i * bytes),
                     part_of(dy, i * bytes),
                     part_of(d_residual_sum, i * bytes),
                     param_of(scale, block, i),
                     data_or_null(mean_high, i * groups),
                     data_or_null(mean_low, i * groups),
                     data_or_null(rstd, i * groups),
                     part_of(*dx, i * bytes),
                     data_or_null(*dscale, feature),
                     data_or_null(*dbias, feature)};
    target->backward(element_of(x), call, pool);
  });
}

}  // namespace
}  // namespace jaxnorm

#define EXPORT extern "C" __attribute__((visibility("default")))

XLA_FFI_DEFINE_HANDLER(kForward, jaxnorm::forward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<jaxnorm::Float32>()
                           .Arg<jaxnorm::Float32>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<jaxnorm::Float32>()
                           .Ret<jaxnorm::Float32>()
                           .Ret<jaxnorm::Float32>()
                           .Ret<jaxnorm::Float32>()
                           .Attr<int64_t>("batch")
                           .Attr<int64_t>("n")
                           .Attr<int64_t>("s")
                           .Attr<int64_t>("g")
                           .Attr<int64_t>("k")
                           .Attr<double>("epsilon")
                           .Attr<bool>("subtract_mean"));

XLA_FFI_DEFINE_HANDLER(kBackward, jaxnorm::backward,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<jaxnorm::Float32>()
                           .Arg<jaxnorm::Float32>()
                           .Arg<jaxnorm::Float32>()
                           .Arg<jaxnorm::Float32>()
                           .Ret<ffi::AnyBuffer>()
                           .Ret<jaxnorm::Float32>()
                           .Ret<jaxnorm::Float32>()
                           .Attr<int64_t>("batch")
                           .Attr<int64_t>("n")
                           .Attr<int64_t>("s")
                           .Attr<int64_t>("g")
                           .Attr<int64_t>("k")
                           .Attr<bool>("subtract_mean"));

EXPORT XLA_FFI_Error* jaxnorm_forward(XLA_FFI_CallFrame* frame) { return kForward(frame); }
EXPORT XLA_FFI_Error* jaxnorm_backward(XLA_FFI_CallFrame* frame) { return kBackward(frame); }

// The version of the headers that this was compiled with. XLA refuses a version newer than its own.
EXPORT int jaxnorm_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

EXPORT const char* jaxnorm_target() { return jaxnorm::target_in_use.load()->name; }

// For tests: use another target, if it runs on this machine.
EXPORT bool jaxnorm_use_target(const char* name) {
  for (const jaxnorm::Target* target : jaxnorm::kTargets) {
    if (!std::strcmp(target->name, name) && jaxnorm::runs_here(*target)) {
      jaxnorm::target_in_use = target;
      return true;
    }
  }
  return false;
}
