// Vectors: one register of the target, full of floats.
//
// Operations have the names of Highway (github.com/google/highway), without its tags, and with the
// destination first. Names in lower case have no counterpart there. lanes.h has partial vectors.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace jaxnorm {
namespace JAXNORM_TARGET {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, or NEON
#endif

// For the bodies of loops: without it, GCC does not inline them.
#define BODY __attribute__((always_inline))

typedef float VF32 __attribute__((vector_size(4 * kLanes)));
typedef double VF64 __attribute__((vector_size(8 * kLanes)));
typedef double Half64 __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VU32 __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VU16 __attribute__((vector_size(2 * kLanes)));

struct bfloat16 {
  uint16_t bits;
};

static inline BODY VF32 Zero() { return VF32{}; }
static inline VF32 Set(float a) { return VF32{} + a; }

// Conversions. For the plain conversions GCC generates more instructions.
#if defined(__AVX512F__)
static inline VU32 PromoteTo(VU16 a) { return (VU32)_mm512_cvtepu16_epi32((__m256i)a); }
static inline VU16 DemoteTo(VU32 a) { return (VU16)_mm512_cvtepi32_epi16((__m512i)a); }
#elif defined(__AVX2__)
static inline VU32 PromoteTo(VU16 a) { return (VU32)_mm256_cvtepu16_epi32((__m128i)a); }
static inline VU16 DemoteTo(VU32 a) {
  const __m256i wide = (__m256i)a;
  return (VU16)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
#else
static inline VU32 PromoteTo(VU16 a) { return __builtin_convertvector(a, VU32); }
static inline VU16 DemoteTo(VU32 a) { return __builtin_convertvector(a, VU16); }
#endif
static inline VF64 PromoteTo(VF32 v) { return __builtin_convertvector(v, VF64); }
static inline VF32 DemoteTo(VF64 d) { return __builtin_convertvector(d, VF32); }

// Loads.
static inline VF32 LoadU(const float* p) {
  VF32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline VF32 LoadU(const bfloat16* p) {
  VU16 halves;
  std::memcpy(&halves, p, sizeof halves);
  return (VF32)(PromoteTo(halves) << 16);
}

static inline VF64 LoadU(const double* p) {
  VF64 d;
  std::memcpy(&d, p, sizeof d);
  return d;
}

// Stores.
static inline void StoreU(float* p, VF32 v) { std::memcpy(p, &v, sizeof v); }
static inline void StoreU(double* p, VF64 d) { std::memcpy(p, &d, sizeof d); }

// Rounds ties to even. NaNs must be canonical: a NaN of all ones would be rounded to zero.
static inline VU16 round_to_bfloat16(VF32 v) {
  VU32 bits = (VU32)v;
  return DemoteTo((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void StoreU(bfloat16* p, VF32 v) {
  VU16 halves = round_to_bfloat16(v);
  std::memcpy(p, &halves, sizeof halves);
}

// Makes NaNs canonical if T is bfloat16. The NaNs of x are canonical already. A NaN of scale or bias
// may not be, and arithmetic keeps its bits.
static inline float canonical_nan(float a) { return a == a ? a : __builtin_nanf(""); }
template <class T>
static inline VF32 canonical_nan(VF32 v) {
  if constexpr (__is_same(T, float)) return v;
  return v == v ? v : Zero() + __builtin_nanf("");
}

// The two halves of v in float64. GCC keeps a VF64 in memory, but these halves in registers.
static inline Half64 PromoteLowerTo(VF32 v) {
#if defined(__AVX512F__)
  return (Half64)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
#elif defined(__AVX2__)
  return (Half64)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
#elif defined(__SSE2__)
  return (Half64)_mm_cvtps_pd((__m128)v);
#else
  Half64 half = {};
  for (int i = 0; i < kLanes / 2; ++i) half[i] = v[i];
  return half;
#endif
}
static inline Half64 PromoteUpperTo(VF32 v) {
#if defined(__AVX512F__)
  return (Half64)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#elif defined(__AVX2__)
  return (Half64)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
#elif defined(__SSE2__)
  return (Half64)_mm_cvtps_pd(_mm_movehl_ps((__m128)v, (__m128)v));
#else
  Half64 half = {};
  for (int i = 0; i < kLanes / 2; ++i) half[i] = v[i + kLanes / 2];
  return half;
#endif
}
static inline Half64 promote_halves(VF32 v) { return PromoteLowerTo(v) + PromoteUpperTo(v); }

static inline VF64 Combine(Half64 upper, Half64 lower) {
  const Half64 halves[] = {lower, upper};
  VF64 d;
  std::memcpy(&d, halves, sizeof d);
  return d;
}

static inline double ReduceSum(Half64 d) {
  double sum = d[0] + d[kLanes / 4];
  for (int i = 1; i < kLanes / 4; ++i) sum += d[i] + d[i + kLanes / 4];
  return sum;
}
static inline double ReduceSum(VF32 v) { return ReduceSum(promote_halves(v)); }

// Streaming: results of this size or more are written past the caches. Otherwise they would evict
// the data there, and each cache line would be read before it is written. Both cost more than to
// read the results again.
constexpr int64_t kStreamBytes = 4 << 20;

#if defined(__AVX512F__)
static inline void Stream(float* p, VF32 v) { _mm512_stream_ps(p, v); }
#elif defined(__AVX2__)
static inline void Stream(float* p, VF32 v) { _mm256_stream_ps(p, v); }
#elif defined(__SSE2__)
static inline void Stream(float* p, VF32 v) { _mm_stream_ps(p, v); }
#endif

// Only after this can other threads read streamed results.
static inline void FlushStream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

#if defined(__SSE2__)
[[maybe_unused]] static inline bool should_stream(const float* row, int64_t elements) {
  return reinterpret_cast<uintptr_t>(row) % sizeof(VF32) == 0 && elements * 4 >= kStreamBytes;
}
#else
static inline bool should_stream(const float*, int64_t) { return false; }
#endif

// Streaming was not faster where it was measured.
static inline bool should_stream(const bfloat16*, int64_t) { return false; }

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
