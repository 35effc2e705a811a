// Vectors of as many floats as a register of the level holds, and sums of them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "norms.h"

namespace jaxnorm {
namespace JAXNORM_LEVEL {

#if defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2, or NEON
#endif

// For the bodies of loops: without it, GCC calls them.
#define BODY __attribute__((always_inline))

typedef float V __attribute__((vector_size(4 * W)));
typedef double D __attribute__((vector_size(8 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct bfloat16 {
  uint16_t bits;
};

// GCC makes two halves and more of the plain conversions.
#if defined(__AVX2__)
static inline Bits widen(Halves a) { return (Bits)_mm256_cvtepu16_epi32((__m128i)a); }
static inline Halves narrow(Bits a) {
  const __m256i wide = (__m256i)a;
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
#else
static inline Bits widen(Halves a) { return __builtin_convertvector(a, Bits); }
static inline Halves narrow(Bits a) { return __builtin_convertvector(a, Halves); }
#endif

// What of a vector there is: all of it; the last lanes, at the end of a longer array, the others
// having been there before; or the first lanes, of an array that is shorter.
struct Whole {};
struct Tail {
  int64_t lanes;
};
struct Short {
  int64_t lanes;
};

static inline V load(const float* p, Whole = {}) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline V load(const bfloat16* p, Whole = {}) {
  Halves halves;
  std::memcpy(&halves, p, sizeof halves);
  return (V)(widen(halves) << 16);
}

static inline void store(float* p, V v, Whole = {}) { std::memcpy(p, &v, sizeof v); }

// Of numbers and plain NaNs: rounding up would carry one of all ones over into a zero.
static inline void store(bfloat16* p, V v, Whole = {}) {
  Bits bits = (Bits)v;
  Halves halves = narrow((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
  std::memcpy(p, &halves, sizeof halves);
}

// A NaN made plain, if T needs that. Those of bfloat16 are; that of a scale or bias, which goes
// through arithmetic as it is, need not be.
static inline float plain(float a) { return a == a ? a : __builtin_nanf(""); }
template <class T>
static inline V plain(V v) {
  if constexpr (__is_same(T, float)) return v;
  return v == v ? v : V{} + __builtin_nanf("");
}

#if defined(__AVX2__)
static inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
#elif defined(__SSE2__)
static inline void stream(float* p, V v) { _mm_stream_ps(p, v); }
#endif

template <class T>
static inline V load(const T* p, Tail tail) {
  return load(p + tail.lanes - W);
}

template <class T>
static inline void store(T* p, V v, Tail tail) {
  store(p + tail.lanes - W, v);
}

template <class T>
static inline V load(const T* p, Short part) {
  T buffer[W] = {};
  for (int i = 0; i < part.lanes; ++i) buffer[i] = p[i];
  return load(buffer);
}

template <class T>
static inline void store(T* p, V v, Short part) {
  T buffer[W];
  store(buffer, v);
  for (int i = 0; i < part.lanes; ++i) p[i] = buffer[i];
}

static inline Ints lane_numbers() {
  Ints lanes;
  for (int i = 0; i < W; ++i) lanes[i] = i;
  return lanes;
}

// Zero for lanes that are not there, or were there before.
static inline V keep(V v, Whole) { return v; }
static inline V keep(V v, Tail tail) {
  return lane_numbers() >= W - static_cast<int32_t>(tail.lanes) ? v : V{};
}
static inline V keep(V v, Short part) {
  return lane_numbers() < static_cast<int32_t>(part.lanes) ? v : V{};
}

static inline V all(float a) { return V{} + a; }

static inline D wide(V v) { return __builtin_convertvector(v, D); }

static inline V narrow(D d) { return __builtin_convertvector(d, V); }

static inline D load(const double* p) {
  D d;
  std::memcpy(&d, p, sizeof d);
  return d;
}

static inline D load(const double* p, Whole) { return load(p); }
static inline D load(const double* p, Tail tail) { return load(p + tail.lanes - W); }

static inline void store(double* p, D d) { std::memcpy(p, &d, sizeof d); }

static inline void add(double* p, D d, Whole) { store(p, load(p) + d); }

// The lanes that were there before have been added before.
static inline void add(double* p, D d, Tail tail) {
  for (int i = W - static_cast<int>(tail.lanes); i < W; ++i) p[i + tail.lanes - W] += d[i];
}

static inline double sum(V v) {
  double part[W];
  store(part, wide(v));
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  }
  return part[0];
}

template <class T>
static inline float get(const T* p) {
  return load(p, Short{1})[0];
}

// Results of this size and more go to memory past the caches: they would push out what is there,
// and the lines that they fill would be read first. Both cost more than reading them back.
constexpr int64_t kStreamBytes = 4 << 20;

[[maybe_unused]] static inline bool streams(const float* row, int64_t elements) {
#if defined(__SSE2__)
  return reinterpret_cast<uintptr_t>(row) % sizeof(V) == 0 && elements * 4 >= kStreamBytes;
#else
  return false;
#endif
}

// Not measured to be faster.
static inline bool streams(const bfloat16*, int64_t) { return false; }

template <class T, class Lanes>
static inline void write(T* p, V v, Lanes lanes, bool streamed) {
#if defined(__SSE2__)
  if constexpr (__is_same(T, float) && __is_same(Lanes, Whole)) {
    if (streamed) return stream(p, v);
  }
#endif
  store(p, v, lanes);
}

// What was written past the caches is there for other threads only after this.
static inline void end_of_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(u, i, lanes) for each vector of n elements from i on; u < 4 tells apart what may run at
// the same time.
template <class Body>
static inline BODY void sweep(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    body(0, i, Whole());
    body(1, i + W, Whole());
    body(2, i + 2 * W, Whole());
    body(3, i + 3 * W, Whole());
  }
  for (; i + W <= n; i += W) body(0, i, Whole());
  if (i == n) return;
  n > W ? body(1, i, Tail{n - i}) : body(1, i, Short{n - i});
}

// task(i) for each i, in parallel.
template <class Task>
static void parallel(Pool& pool, int64_t tasks, const Task& task) {
  pool.run(
      tasks,
      [](const void* context, int64_t i) {
        (*static_cast<const Task*>(context))(i);
        end_of_stream();
      },
      &task);
}

// Memory for one call; zeros.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new T[size]()) {}
  ~Scratch() { delete[] data_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* operator+(int64_t offset) const { return data_ + offset; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// The gradients of one feature's scale and bias, where they are wanted.
static inline void put(const Backward& f, int64_t feature, double dscale, double dbias) {
  if (f.dscale) f.dscale[feature] = static_cast<float>(dscale);
  if (f.dbias) f.dbias[feature] = static_cast<float>(dbias);
}

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Into how many tasks to divide: a matter of shape alone, so that sums are added in one order on
// every machine. `most` keeps what each task needs for itself small.
static inline int64_t tasks_for(int64_t elements, int64_t most) {
  constexpr int64_t kElements = 1 << 16;
  return larger(1, smaller(smaller(elements / kElements, 64), most));
}

}  // namespace JAXNORM_LEVEL
}  // namespace jaxnorm
