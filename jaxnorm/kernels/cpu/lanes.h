// Vectors of which some lanes are not there, at the end of an array, and loops over arrays.
//
// Functions that end in N take `lanes`: Whole, or which part of a vector is there.
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

// The first lanes. What is not there is zero when it is loaded.
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

// The last lanes, at the end of a longer array, where the other lanes belong to the vector before;
// or the first lanes, of an array that is shorter than a vector.
struct Tail {
  int64_t lanes;
};
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

// The other lanes have been added with the vector before.
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
// Zero in the lanes that are not there, or belong to the vector before.
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

// body(u, i, lanes) for each vector of n elements from i on. Calls with different u < 4 may run at
// the same time, so sums that differ by u do not wait for each other.
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
