// The handlers of XLA's FFI calls. They check the arguments and call the best target that this
// machine supports.
#include <atomic>
#include <cstring>
#include <new>
#include <utility>

#include "arguments.h"
#include "blocks.h"
#include "norms.h"
#include "xla/ffi/api/ffi.h"

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

bool is_supported([[maybe_unused]] const Target& target) {
#if defined(JAXNORM_AVX2)
  if (&target == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(JAXNORM_AVX512)
  // Older processors, which lack VBMI2, lower their clock for vectors of 512 bits.
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
    if (is_supported(*target)) return target;
  }
  return &kBaseline;
}

std::atomic<const Target*> current_target{best_target()};

template <class... Arguments>
ffi::Error run_blocks(Arguments&&... arguments) {
  try {
    each_block(std::forward<Arguments>(arguments)...);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxnorm's kernel: out of memory");
  }
}

// Normalizes `batch` blocks, which may each have a scale and bias.
ffi::Error forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer residual, Float32 scale,
                   Float32 bias, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> residual_sum,
                   ffi::Result<Float32> mean_high, ffi::Result<Float32> mean_low,
                   ffi::Result<Float32> var, ffi::Result<Float32> rstd, int64_t batch,
                   int64_t n, int64_t s, int64_t g, int64_t k, double epsilon, bool subtract_mean) {
  const Block block = {n, s, g, k};
  if (ffi::Error error = check(x, block, batch); error.failure()) return error;
  const int64_t groups = block.groups(), means = subtract_mean ? batch * groups : 0;
  if (!has_size(*mean_high, means) || !has_size(*mean_low, means) || !has_size(*var, batch * groups) ||
      !has_size(*rstd, batch * groups)) {
    return invalid("statistics of another size");
  }
  if (!fits_blocks(scale, block, batch) || !fits_blocks(bias, block, batch)) {
    return invalid("a scale or bias of another size");
  }
  if (y->element_count() != x.element_count() || y->element_type() != x.element_type()) {
    return invalid("a result unlike x");
  }
  const bool has_residual = residual.element_count() > 0;
  if (!like_or_none(residual, x) || !like_or_none(*residual_sum, x) ||
      has_residual != (residual_sum->element_count() > 0)) {
    return invalid("a residual or a residual_sum unlike x");
  }
  if (has_residual && (s > 1 || (k > kLongestSum && x.element_type() == ffi::BF16))) {
    return invalid("a residual for columns or for long rows of bfloat16");
  }
  const int64_t elements = x.element_count(), bytes = x.size_bytes() / batch;
  const Target* target = current_target;
  return run_blocks(threads, batch, elements, [&](int64_t i, Pool& pool) {
    Forward call = {block,
                    elements,
                    epsilon,
                    subtract_mean,
                    data_or_null_at(x, i * bytes),
                    data_or_null_at(residual, i * bytes),
                    param_of(scale, block, i),
                    param_of(bias, block, i),
                    data_or_null_at(*y, i * bytes),
                    data_or_null_at(*residual_sum, i * bytes),
                    {data_or_null(*mean_high, i * groups), data_or_null(*mean_low, i * groups),
                     data_or_null(*var, i * groups), data_or_null(*rstd, i * groups)}};
    target->forward(element_of(x), call, pool);
  });
}

// Computes the gradients of `batch` blocks, each with its own dscale and dbias.
ffi::Error backward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer dy,
                    ffi::AnyBuffer d_residual_sum, Float32 scale, Float32 mean_high, Float32 mean_low,
                    Float32 rstd, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<Float32> dscale,
                    ffi::Result<Float32> dbias, int64_t batch, int64_t n, int64_t s, int64_t g,
                    int64_t k, bool subtract_mean) {
  const Block block = {n, s, g, k};
  if (ffi::Error error = check(x, block, batch); error.failure()) return error;
  const int64_t groups = block.groups(), means = subtract_mean ? batch * groups : 0;
  if (!has_size(mean_high, means) || !has_size(mean_low, means) || !has_size(rstd, batch * groups)) {
    return invalid("statistics of another size");
  }
  if (!fits_blocks(scale, block, batch) || !has_size_or_none(*dscale, batch * block.features()) ||
      !has_size_or_none(*dbias, batch * block.features())) {
    return invalid("a scale or bias of another size");
  }
  for (const ffi::AnyBuffer& a : {dy, *dx}) {
    if (a.element_count() != x.element_count() || a.element_type() != x.element_type()) {
      return invalid("a gradient unlike x");
    }
  }
  if (!like_or_none(d_residual_sum, x) || (d_residual_sum.element_count() > 0 && s > 1)) {
    return invalid("a gradient of the residual_sum unlike x, or for columns");
  }
  const int64_t elements = x.element_count(), bytes = x.size_bytes() / batch;
  const Target* target = current_target;
  return run_blocks(threads, batch, elements, [&](int64_t i, Pool& pool) {
    const int64_t feature = i * block.features();
    Backward call = {block,
                     elements,
                     subtract_mean,
                     data_or_null_at(x, i * bytes),
                     data_or_null_at(dy, i * bytes),
                     data_or_null_at(d_residual_sum, i * bytes),
                     param_of(scale, block, i),
                     data_or_null(mean_high, i * groups),
                     data_or_null(mean_low, i * groups),
                     data_or_null(rstd, i * groups),
                     data_or_null_at(*dx, i * bytes),
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

// The version of the headers that this was compiled with. XLA refuses newer versions than its own.
EXPORT int jaxnorm_api_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

EXPORT const char* jaxnorm_target() { return jaxnorm::current_target.load()->name; }

// Uses another target, for tests; returns false if this machine does not support it.
EXPORT bool jaxnorm_use_target(const char* name) {
  for (const jaxnorm::Target* target : jaxnorm::kTargets) {
    if (!std::strcmp(target->name, name) && jaxnorm::is_supported(*target)) {
      jaxnorm::current_target = target;
      return true;
    }
  }
  return false;
}
