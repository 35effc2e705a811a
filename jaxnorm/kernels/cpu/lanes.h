// Partial vectors, at the end of an array, and loops over arrays.
//
// Functions that end in N have an argument `lanes`: Whole, Tail or Short, the lanes that are valid.
#pragma once

#include "simd.h"

namespace jaxnorm {
namespace JAXNORM_TARGET {

struct Whole {};

template <class T>
static inline BODY auto LoadN(const T* p, Whole) {
  return LoadU(p);
}
template <class T>
static inline BODY void StoreN(T* p, VF32 v, Whole) {
  StoreU(p, v);
}
static inline void add_to(double* p, VF64 d, Whole) { StoreU(p, LoadU(p) + d); }
static inline VF32 IfThenElseZero(Whole, VF32 v) { return v; }

#if defined(__AVX512F__)

// The first lanes are valid. Loads set the other lanes to zero.
struct Tail {
  int64_t lanes;
};
using Short = Tail;

static inline __mmask16 mask_of(Tail tail) { return static_cast<__mmask16>((1 << tail.lanes) - 1); }
static inline __mmask8 low(__mmask16 mask) { return static_cast<__mmask8>(mask); }
static inline __mmask8 high(__mmask16 mask) { return static_cast<__mmask8>(mask >> 8); }

static inline VF32 LoadN(const float* p, Tail tail) {
  return (VF32)_mm512_maskz_loadu_ps(mask_of(tail), p);
}
static inline VF32 LoadN(const bfloat16* p, Tail tail) {
  return (VF32)(PromoteTo((VU16)_mm256_maskz_loadu_epi16(mask_of(tail), p)) << 16);
}
static inline VF64 LoadN(const double* p, Tail tail) {
  const __mmask16 mask = mask_of(tail);
  const __m512d halves[] = {_mm512_maskz_loadu_pd(low(mask), p), _mm512_maskz_loadu_pd(high(mask), p + 8)};
  VF64 d;
  std::memcpy(&d, halves, sizeof d);
  return d;
}

static inline void StoreN(float* p, VF32 v, Tail tail) {
  _mm512_mask_storeu_ps(p, mask_of(tail), (__m512)v);
}
static inline void StoreN(bfloat16* p, VF32 v, Tail tail) {
  _mm256_mask_storeu_epi16(p, mask_of(tail), (__m256i)round_to_bfloat16(v));
}
static inline void add_to(double* p, VF64 d, Tail tail) {
  const __mmask16 mask = mask_of(tail);
  d += LoadN(p, tail);
  __m512d halves[2];
  std::memcpy(halves, &d, sizeof d);
  _mm512_mask_storeu_pd(p, low(mask), halves[0]);
  _mm512_mask_storeu_pd(p + 8, high(mask), halves[1]);
}

static inline VF32 IfThenElseZero(Tail tail, VF32 v) {
  return (VF32)_mm512_maskz_mov_ps(mask_of(tail), (__m512)v);
}

#else

// The last lanes are valid, at the end of a longer array. The other lanes belong to the previous
// vector.
struct Tail {
  int64_t lanes;
};
// The first lanes are valid, in an array that is shorter than a vector.
struct Short {
  int64_t lanes;
};

template <class T>
static inline auto LoadN(const T* p, Tail tail) {
  return LoadU(p + tail.lanes - kLanes);
}
template <class T>
static inline VF32 LoadN(const T* p, Short part) {
  T buffer[kLanes] = {};
  for (int i = 0; i < part.lanes; ++i) buffer[i] = p[i];
  return LoadU(buffer);
}

template <class T>
static inline void StoreN(T* p, VF32 v, Tail tail) {
  StoreU(p + tail.lanes - kLanes, v);
}
template <class T>
static inline void StoreN(T* p, VF32 v, Short part) {
  T buffer[kLanes];
  StoreU(buffer, v);
  for (int i = 0; i < part.lanes; ++i) p[i] = buffer[i];
}

// The other lanes were added with the previous vector.
static inline void add_to(double* p, VF64 d, Tail tail) {
  for (int i = kLanes - static_cast<int>(tail.lanes); i < kLanes; ++i) {
    p[i + tail.lanes - kLanes] += d[i];
  }
}

static inline VI32 Iota() {
  VI32 lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}
// Sets the lanes that are not valid to zero.
static inline VF32 IfThenElseZero(Tail tail, VF32 v) {
  return Iota() >= kLanes - static_cast<int32_t>(tail.lanes) ? v : Zero();
}
static inline VF32 IfThenElseZero(Short part, VF32 v) {
  return Iota() < static_cast<int32_t>(part.lanes) ? v : Zero();
}

#endif

template <class T>
static inline float load_scalar(const T* p) {
  return LoadN(p, Short{1})[0];
}

template <class T, class Lanes>
static inline void store_or_stream(T* p, VF32 v, Lanes lanes, [[maybe_unused]] bool streamed) {
#if defined(__SSE2__)
  if constexpr (__is_same(T, float) && __is_same(Lanes, Whole)) {
    if (streamed) return Stream(p, v);
  }
#endif
  StoreN(p, v, lanes);
}

// Calls body(u, i, lanes) for each vector of n elements, which begins at i. Calls with different
// u < 4 may run at the same time: the sums of one u do not depend on another u.
template <class Body>
static inline BODY void for_each_vector(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    body(0, i, Whole());
    body(1, i + kLanes, Whole());
    body(2, i + 2 * kLanes, Whole());
    body(3, i + 3 * kLanes, Whole());
  }
  for (; i + kLanes <= n; i += kLanes) body(0, i, Whole());
  if (i == n) return;
  n > kLanes ? body(1, i, Tail{n - i}) : body(1, i, Short{n - i});
}

}  // namespace JAXNORM_TARGET
}  // namespace jaxnorm
