// Vectors of the width this file is compiled for. Included only by the per-level kernels (pool, mix, gate, norm), each of
// which is compiled once per SIMD level into a namespace of that level's name; everything here has internal linkage,
// so that no wide instruction can leak into code that runs on a narrower machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include <utility>

#include "kernels.h"
#include "tuning.h"

#if defined(COORDATT_SIMD_AVX512_BF16)
#define COORDATT_SIMD_AVX512
#define COORDATT_LEVEL avx512_bf16
#define COORDATT_VBYTES 64
#include <immintrin.h>
#elif defined(COORDATT_SIMD_AVX512)
#define COORDATT_LEVEL avx512
#define COORDATT_VBYTES 64
#include <immintrin.h>
#elif defined(COORDATT_SIMD_AVX2)
#define COORDATT_LEVEL avx2
#define COORDATT_VBYTES 32
#include <immintrin.h>
#elif defined(COORDATT_SIMD_NEON)
#define COORDATT_LEVEL neon
#define COORDATT_VBYTES 16
#include <arm_neon.h>
#else
#define COORDATT_LEVEL baseline
#define COORDATT_VBYTES 16
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 warns of its own intrinsics' undefined operands
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define COORDATT_INLINE static inline __attribute__((always_inline))
#define COORDATT_MEMBER inline __attribute__((always_inline))  // the same within a class

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

typedef float vfloat __attribute__((vector_size(COORDATT_VBYTES)));
typedef double vdouble __attribute__((vector_size(COORDATT_VBYTES)));
typedef int32_t vint __attribute__((vector_size(COORDATT_VBYTES)));
typedef uint32_t vuint __attribute__((vector_size(COORDATT_VBYTES)));
typedef uint16_t vhalf __attribute__((vector_size(COORDATT_VBYTES / 2)));

typedef float vfloat_u __attribute__((vector_size(COORDATT_VBYTES), aligned(4), may_alias));
typedef double vdouble_u __attribute__((vector_size(COORDATT_VBYTES), aligned(8), may_alias));
typedef uint16_t vhalf_u __attribute__((vector_size(COORDATT_VBYTES / 2), aligned(2), may_alias));

// Acc: what a stored type is computed in. Lanes are counted in Acc.
template <class X> struct AccOf { typedef float type; };
template <> struct AccOf<double> { typedef double type; };
template <class X> using Acc = typename AccOf<X>::type;
template <class A> struct VecOf { typedef vfloat type; };
template <> struct VecOf<double> { typedef vdouble type; };
template <class A> using Vec = typename VecOf<A>::type;
template <class A> constexpr int lanes = COORDATT_VBYTES / (int)sizeof(A);

COORDATT_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000u | ((rest & 0x3ff) << 13) | ((rest & 0x3ff) ? 0x400000u : 0);
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {
    float f = (float)rest * 5.9604644775390625e-8f;  // subnormal: units of 2^-24
    memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

COORDATT_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = (bits >> 16) & 0x8000, mag = bits & 0x7fffffffu;
  if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
  if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or more
  if (mag < 0x38800000u) {                                   // subnormal: the float adder does the rounding
    float m, magic = 0.5f;
    memcpy(&m, &mag, 4);
    m += magic;
    uint32_t r;
    memcpy(&r, &m, 4);
    return (uint16_t)(sign | (r - 0x3f000000u));
  }
  uint32_t r = mag + 0xfffu + ((mag >> 13) & 1) - 0x38000000u;
  return (uint16_t)(sign | (r >> 13));
}

// Intrinsics where there are some: gcc makes three to five instructions of __builtin_convertvector.
COORDATT_INLINE vuint to_words(vhalf h) {
#if defined(COORDATT_SIMD_AVX512)
  return (vuint)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(COORDATT_SIMD_AVX2)
  return (vuint)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, vuint);
#endif
}

COORDATT_INLINE vhalf to_halves(vuint u) {  // of values below 2^16
#if defined(COORDATT_SIMD_AVX512)
  return (vhalf)_mm512_cvtepi32_epi16((__m512i)u);
#elif defined(COORDATT_SIMD_AVX2)
  return (vhalf)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
  return __builtin_convertvector(u, vhalf);
#endif
}

COORDATT_INLINE vfloat widen(vhalf h, BFloat16*) { return (vfloat)(to_words(h) << 16); }

COORDATT_INLINE vhalf narrow(vfloat v, BFloat16*) {  // round to nearest even, NaN stays NaN
#if defined(COORDATT_SIMD_AVX512_BF16)
  return (vhalf)_mm512_cvtneps_pbh((__m512)v);  // takes subnormals, below 1.2e-38, for zero
#else
  vuint u = (vuint)v;
  vuint r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vuint nan = 0x7fc0u - (vuint){};
  r = v != v ? nan : r;
  return to_halves(r);
#endif
}

COORDATT_INLINE vfloat widen(vhalf h, Float16*) {
#if defined(COORDATT_SIMD_AVX512)
  return (vfloat)_mm512_cvtph_ps((__m256i)h);
#elif defined(COORDATT_SIMD_AVX2)
  return (vfloat)_mm256_cvtph_ps((__m128i)h);
#else
  vfloat v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = half_to_float(h[i]);
  return v;
#endif
}

COORDATT_INLINE vhalf narrow(vfloat v, Float16*) {
#if defined(COORDATT_SIMD_AVX512)
  return (vhalf)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(COORDATT_SIMD_AVX2)
  return (vhalf)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vhalf h;
  for (int i = 0; i < lanes<float>; ++i) h[i] = float_to_half(v[i]);
  return h;
#endif
}

COORDATT_INLINE vfloat load(const float* p) { return *(const vfloat_u*)p; }
COORDATT_INLINE vdouble load(const double* p) { return *(const vdouble_u*)p; }
template <class H> COORDATT_INLINE vfloat load(const H* p) { return widen(*(const vhalf_u*)p, (H*)0); }

COORDATT_INLINE void store(float* p, vfloat v) { *(vfloat_u*)p = v; }
COORDATT_INLINE void store(double* p, vdouble v) { *(vdouble_u*)p = v; }
template <class H> COORDATT_INLINE void store(H* p, vfloat v) { *(vhalf_u*)p = narrow(v, (H*)0); }

COORDATT_INLINE vfloat splat(float a) { return a - (vfloat){}; }
COORDATT_INLINE vdouble splat(double a) { return a - (vdouble){}; }

// a * b + c in one rounding where the level has it. The compiler contracts nothing by itself (-ffp-contract=off): whether
// it would depends on the code around, and with it the last bit on how the work was cut.
COORDATT_INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
#if defined(COORDATT_SIMD_AVX512)
  return (vfloat)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(COORDATT_SIMD_AVX2)
  return (vfloat)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(COORDATT_SIMD_NEON)
  return (vfloat)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
COORDATT_INLINE vdouble fma(vdouble a, vdouble b, vdouble c) {
#if defined(COORDATT_SIMD_AVX512)
  return (vdouble)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(COORDATT_SIMD_AVX2)
  return (vdouble)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(COORDATT_SIMD_NEON)
  return (vdouble)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The first k lanes of a vector (0 <= k <= lanes), made once for a row length.
template <class A> struct Tail {
  int k;
#if defined(COORDATT_SIMD_AVX512)
  uint32_t mask;
  explicit COORDATT_MEMBER Tail(int64_t count) : k((int)count), mask((1u << count) - 1u) {}
#elif defined(COORDATT_SIMD_AVX2)
  __m256i mask;
  explicit COORDATT_MEMBER Tail(int64_t count) : k((int)count) {
    int32_t m[8];
    for (int i = 0; i < 8; ++i) m[i] = i / (int)(sizeof(A) / 4) < count ? -1 : 0;
    memcpy(&mask, m, 32);
  }
#else
  explicit COORDATT_MEMBER Tail(int64_t count) : k((int)count) {}
#endif
};

// Loads k elements into the first lanes, zeros elsewhere; touches no memory beyond them.
COORDATT_INLINE vfloat load(const float* p, const Tail<float>& t) {
#if defined(COORDATT_SIMD_AVX512)
  return (vfloat)_mm512_maskz_loadu_ps((__mmask16)t.mask, p);
#elif defined(COORDATT_SIMD_AVX2)
  return (vfloat)_mm256_maskload_ps(p, t.mask);
#else
  vfloat v = {};
  for (int i = 0; i < t.k; ++i) v[i] = p[i];
  return v;
#endif
}

COORDATT_INLINE vdouble load(const double* p, const Tail<double>& t) {
#if defined(COORDATT_SIMD_AVX512)
  return (vdouble)_mm512_maskz_loadu_pd((__mmask8)t.mask, p);
#elif defined(COORDATT_SIMD_AVX2)
  return (vdouble)_mm256_maskload_pd(p, t.mask);
#else
  vdouble v = {};
  for (int i = 0; i < t.k; ++i) v[i] = p[i];
  return v;
#endif
}

template <class H> COORDATT_INLINE vfloat load(const H* p, const Tail<float>& t) {
#if defined(COORDATT_SIMD_AVX512)
  return widen((vhalf)_mm256_maskz_loadu_epi16((__mmask16)t.mask, p), (H*)0);
#else
  vhalf h = {};
  for (int i = 0; i < t.k; ++i) h[i] = p[i].bits;
  return widen(h, (H*)0);
#endif
}

COORDATT_INLINE void store(float* p, vfloat v, const Tail<float>& t) {
#if defined(COORDATT_SIMD_AVX512)
  _mm512_mask_storeu_ps(p, (__mmask16)t.mask, (__m512)v);
#elif defined(COORDATT_SIMD_AVX2)
  _mm256_maskstore_ps(p, t.mask, (__m256)v);
#else
  for (int i = 0; i < t.k; ++i) p[i] = v[i];
#endif
}

COORDATT_INLINE void store(double* p, vdouble v, const Tail<double>& t) {
#if defined(COORDATT_SIMD_AVX512)
  _mm512_mask_storeu_pd(p, (__mmask8)t.mask, (__m512d)v);
#elif defined(COORDATT_SIMD_AVX2)
  _mm256_maskstore_pd(p, t.mask, (__m256d)v);
#else
  for (int i = 0; i < t.k; ++i) p[i] = v[i];
#endif
}

template <class H> COORDATT_INLINE void store(H* p, vfloat v, const Tail<float>& t) {
  vhalf h = narrow(v, (H*)0);
#if defined(COORDATT_SIMD_AVX512)
  _mm256_mask_storeu_epi16(p, (__mmask16)t.mask, (__m256i)h);
#else
  for (int i = 0; i < t.k; ++i) p[i].bits = h[i];
#endif
}

// Shuffles with constant indices. keep_low: lanes without bit D from a, lanes with it from b moved up by D;
// keep_high: lanes without bit D from a moved down by D, lanes with it from b.
template <int D, class V, size_t... I>
COORDATT_INLINE V keep_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? I - D + sizeof...(I) : I)...);
}
template <int D, class V, size_t... I>
COORDATT_INLINE V keep_high(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, ((I & D) ? I + sizeof...(I) : I + D)...);
}

template <int D, int N, class V>
COORDATT_INLINE void transpose_stage(V* r) {
  if constexpr (D > 0) {
    for (int i = 0; i < N; ++i)
      if (!(i & D)) {
        V lo = keep_low<D>(r[i], r[i + D], std::make_index_sequence<N>());
        V hi = keep_high<D>(r[i], r[i + D], std::make_index_sequence<N>());
        r[i] = lo;
        r[i + D] = hi;
      }
    transpose_stage<D / 2, N>(r);
  }
}

// r: N vectors of N lanes, transposed in place.
template <class A> COORDATT_INLINE void transpose(Vec<A>* r) { transpose_stage<lanes<A> / 2, lanes<A>>(r); }

template <int D, int N, class V>
COORDATT_INLINE void sum_stage(V* r) {
  if constexpr (D > 0) {
    for (int i = 0; i < D; ++i)
      r[i] = keep_low<D>(r[i], r[i + D], std::make_index_sequence<N>()) +
             keep_high<D>(r[i], r[i + D], std::make_index_sequence<N>());
    sum_stage<D / 2, N>(r);
  }
}

// Lane k of the result is the sum over the lanes of r[k], each in the same order. r is used up.
template <class A> COORDATT_INLINE Vec<A> sum_each(Vec<A>* r) {
  sum_stage<lanes<A> / 2, lanes<A>>(r);
  return r[0];
}

// out[j] = column j of the 16 or fewer rows at from[0 .. lanes - 1], one vector of each row.
template <class A> COORDATT_INLINE void transpose_rows(const A* const* from, Vec<A>* out) {
  for (int i = 0; i < lanes<A>; ++i) out[i] = load(from[i]);
  transpose<A>(out);
}

#if defined(COORDATT_SIMD_AVX512)
// The same in shuffles that stay within 128-bit lanes, the lanes being gathered by the loads: 32 shuffles instead of 64.
template <> inline __attribute__((always_inline)) void transpose_rows<float>(const float* const* from, vfloat* out) {
  for (int k = 0; k < 4; ++k) {
    __m512 t[4];
    for (int j = 0; j < 4; ++j) {
      t[j] = _mm512_castps128_ps512(_mm_loadu_ps(from[j] + 4 * k));
      t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(from[4 + j] + 4 * k), 1);
      t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(from[8 + j] + 4 * k), 2);
      t[j] = _mm512_insertf32x4(t[j], _mm_loadu_ps(from[12 + j] + 4 * k), 3);
    }
    __m512d a = (__m512d)_mm512_unpacklo_ps(t[0], t[1]), b = (__m512d)_mm512_unpacklo_ps(t[2], t[3]);
    __m512d c = (__m512d)_mm512_unpackhi_ps(t[0], t[1]), d = (__m512d)_mm512_unpackhi_ps(t[2], t[3]);
    out[4 * k] = (vfloat)_mm512_unpacklo_pd(a, b);
    out[4 * k + 1] = (vfloat)_mm512_unpackhi_pd(a, b);
    out[4 * k + 2] = (vfloat)_mm512_unpacklo_pd(c, d);
    out[4 * k + 3] = (vfloat)_mm512_unpackhi_pd(c, d);
  }
}

// Four vectors a to d: lane j of quarter q of the result is the sum of quarter q of vector j.
COORDATT_INLINE __m512 sum_quarters(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
}
COORDATT_INLINE __m512 sum_quarters(const float* p) {
  return sum_quarters(_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16), _mm512_loadu_ps(p + 32), _mm512_loadu_ps(p + 48));
}

template <> inline __attribute__((always_inline)) vfloat sum_each<float>(vfloat* r) {
  __m512 t[4];
  for (int i = 0; i < 4; ++i)
    t[i] = sum_quarters((__m512)r[4 * i], (__m512)r[4 * i + 1], (__m512)r[4 * i + 2], (__m512)r[4 * i + 3]);
  __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x44), _mm512_shuffle_f32x4(t[0], t[1], 0xee));
  __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x44), _mm512_shuffle_f32x4(t[2], t[3], 0xee));
  return (vfloat)_mm512_add_ps(_mm512_shuffle_f32x4(u, v, 0x88), _mm512_shuffle_f32x4(u, v, 0xdd));
}
#endif

// exp on float lanes: Cody-Waite reduction and a degree-6 polynomial (relative error below 2 ulp); NaN stays NaN, above 88.4 inf, below -87.7 zero.
COORDATT_INLINE vfloat exp(vfloat x) {
  vfloat hi = splat(89.0f), lo = splat(-89.0f);
  x = x > hi ? hi : x;
  x = x < lo ? lo : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vfloat t = fma(x, splat(1.44269504088896341f), splat(magic));
  vint n = (vint)t - 0x4b400000;
  vfloat k = t - magic;
  vfloat r = fma(k, splat(-0.693359375f), x);
  r = fma(k, splat(2.12194440e-4f), r);
  vfloat p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  vint low = n < -127;
  n = (n & ~low) | (-127 & low);
  vint high = n > 128;
  n = (n & ~high) | (128 & high);
  return p * (vfloat)((n + 127) << 23);
}

COORDATT_INLINE vdouble exp(vdouble x) {
  vdouble y = {};
  for (int i = 0; i < lanes<double>; ++i) y[i] = __builtin_exp(x[i]);
  return y;
}

template <class V> COORDATT_INLINE V sigmoid(V x) { return 1.0f / (1.0f + exp(-x)); }

#if defined(COORDATT_SIMD_AVX512)
// A 14-bit reciprocal and two Newton steps: half the cost of a 512-bit division, same last bits.
COORDATT_INLINE vfloat sigmoid(vfloat x) {
  vfloat d = 1.0f + exp(-x);
  vfloat r = (vfloat)_mm512_rcp14_ps((__m512)d);
  const vfloat one = splat(1.0f);
  vfloat s = fma(r, fma(-d, r, one), r);
  s = fma(s, fma(-d, s, one), s);
  vint inf = d > 3e38f;  // 1/inf: the Newton step would make inf * 0
  return (vfloat)((vint)s & ~inf);
}
#endif

// add(an element of the type, its kernels) for every stored type that this level is compiled for.
template <class F> COORDATT_INLINE void for_each_type(Kernels& k, const F& add) {
  add(BFloat16(), k.map[(int)DType::bf16]);
#if !defined(COORDATT_SIMD_AVX512_BF16)  // which changes nothing else
  add(float(), k.map[(int)DType::f32]);
  add(double(), k.map[(int)DType::f64]);
  add(Float16(), k.map[(int)DType::f16]);
#endif
}

COORDATT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

template <class T> COORDATT_INLINE T min_of(T a, T b) { return a < b ? a : b; }

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
