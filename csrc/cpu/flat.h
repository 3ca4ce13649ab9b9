// Small planes walked flat, the gates of each element looked up in registers by index: rows of 7 or 14 would leave lanes
// empty and split cache lines.
#pragma once

#include "tile.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// One plane at a time: a table of one axis' gates in a vector, or a pair. flat_limit: the longest axis it reaches.
#if defined(COORDATT_SIMD_AVX512)
#define COORDATT_HAS_FLAT
constexpr int flat_limit = 32;
template <bool PAIR> struct Table {
  __m512 low, high;
  explicit inline __attribute__((always_inline)) Table(const float* p)
      : low(_mm512_loadu_ps(p)), high(PAIR ? _mm512_loadu_ps(p + 16) : _mm512_setzero_ps()) {}
  inline __attribute__((always_inline)) vfloat operator[](vint index) const {
    return PAIR ? (vfloat)_mm512_permutex2var_ps(low, (__m512i)index, high)
                : (vfloat)_mm512_permutexvar_ps((__m512i)index, low);
  }
};
#elif defined(COORDATT_SIMD_AVX2)
#define COORDATT_HAS_FLAT
constexpr int flat_limit = 8;
template <bool PAIR> struct Table {
  __m256 low;
  explicit inline __attribute__((always_inline)) Table(const float* p) : low(_mm256_loadu_ps(p)) {}
  inline __attribute__((always_inline)) vfloat operator[](vint index) const {
    return (vfloat)_mm256_permutevar8x32_ps(low, (__m256i)index);
  }
};
#else
constexpr int flat_limit = 0;
#endif

COORDATT_INLINE vint load(const int32_t* p) { return (vint)load((const float*)p); }

template <class A> COORDATT_INLINE bool is_flat(int64_t h, int64_t w) {
  return sizeof(A) == 4 && h <= flat_limit && w <= flat_limit && h * w <= flat_elements;
}

// Row and column of each element of a plane.
COORDATT_INLINE void flat_indices(int64_t height, int64_t width, int32_t* row, int32_t* column) {
  for (int64_t h = 0, i = 0; h < height; ++h)
    for (int64_t w = 0; w < width; ++w, ++i) {
      row[i] = (int32_t)h;
      column[i] = (int32_t)w;
    }
}

#if defined(COORDATT_SIMD_AVX512)
// Planes of at least 16 elements with H + W <= 16, back to back: a run of 16 planes is whole, aligned vectors, each of at
// most two planes. A plane's table is [a_h | a_w]; an index below 16 looks in the vector's first plane, else the next.
// (960 x 7 x 7: the gate took 12.1 us plane by plane, spread 18.)
struct FlatRun {
  static constexpr int planes = 16;
  int64_t h = 0, w = 0;
  int32_t row[flat_elements], column[flat_elements], first[flat_elements / 16];
  static bool fits(int64_t h, int64_t w) { return h + w <= 16 && h * w >= 16; }
  inline __attribute__((always_inline)) void set(int64_t height, int64_t width) {
    if (h == height && w == width) return;
    h = height;
    w = width;
    for (int64_t e = 0; e < planes * h * w; ++e) {
      int64_t begin = e / 16 * 16 / (h * w), in = e % (h * w), next = e / (h * w) - begin;
      if (e % 16 == 0) first[e / 16] = (int32_t)begin;
      row[e] = (int32_t)(next * 16 + in / w);
      column[e] = (int32_t)(next * 16 + h + in % w);
    }
  }
};
static thread_local FlatRun flat_run;  // made once a shape

// tables [17][16] of the planes [c, c + count), times scale [16].
COORDATT_INLINE void run_tables(const AxisRows& rows, int64_t c, int64_t count, int64_t h, int64_t w, vfloat scale,
                                float* tables) {
  const float* from[16];
  for (int l = 0; l < 16; ++l)
    from[l] = (l < h ? (const float*)rows.h + l * rows.ld : (const float*)rows.w + min_of<int64_t>(l - h, w - 1) * rows.ld) + c;
  pointers_to_tile<float>(from, count, scale, tables, 16);
}

// Planes at most 16 wide, rows h and h + 1 in one vector, a half each: elements 0 to 7 in low, from 8 on in high.
template <bool WIDE> struct RowPairs {
  int64_t h, w, count;
  __mmask8 first, rest;
  static bool fits(int64_t h, int64_t w) { return w <= 16 && h <= short_plane; }
  RowPairs(int64_t height, int64_t width)
      : h(height), w(width), count((height + 1) / 2), first((__mmask8)((1u << (width < 8 ? width : 8)) - 1u)),
        rest((__mmask8)(width > 8 ? (1u << (width - 8)) - 1u : 0u)) {}
  template <class X>
  inline __attribute__((always_inline)) __m512 both(const X* x, __mmask8 lanes, bool pair) const {
    if constexpr (sizeof(X) == 4) {
      __m512 v = _mm512_zextps256_ps512(_mm256_maskz_loadu_ps(lanes, x));
      return pair ? _mm512_insertf32x8(v, _mm256_maskz_loadu_ps(lanes, x + w), 1) : v;
    } else {
      __m256i v = _mm256_zextsi128_si256(_mm_maskz_loadu_epi16(lanes, x));
      if (pair) v = _mm256_inserti128_si256(v, _mm_maskz_loadu_epi16(lanes, x + w), 1);
      return (__m512)widen((vhalf)v, (X*)0);
    }
  }
  // x: element 0 of row 2 p.
  template <class X> inline __attribute__((always_inline)) __m512 low(const X* x, int64_t p) const {
    const bool pair = 2 * p + 1 < h;
    if constexpr (!WIDE && sizeof(X) == 4) return _mm512_maskz_expandloadu_ps((__mmask16)(pair ? first * 0x101u : first), x);
    return both(x, WIDE ? (__mmask8)0xff : first, pair);
  }
  template <class X> inline __attribute__((always_inline)) __m512 high(const X* x, int64_t p) const {
    return both(x + 8, rest, 2 * p + 1 < h);
  }
  inline __attribute__((always_inline)) void store_columns(float* columns, __m512 low, __m512 high) const {
    auto halves = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    _mm256_storeu_ps(columns, halves(low));
    if (WIDE) _mm256_storeu_ps(columns + 8, halves(high));
  }
  // parts [pair][16 planes][16] -> body(row, its sums of the 16 planes): as sum_each, but the halves stay apart.
  template <class F> inline __attribute__((always_inline)) void each_row(const float* parts, F&& body) const {
    for (int64_t p = 0; p < count; ++p) {
      __m512 t[4];
      for (int i = 0; i < 4; ++i, parts += 64) t[i] = sum_quarters(parts);
      __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
      __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x88), _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
      body(2 * p, _mm512_shuffle_f32x4(u, v, 0x88));
      if (2 * p + 1 < h) body(2 * p + 1, _mm512_shuffle_f32x4(u, v, 0xdd));
    }
  }
};

COORDATT_INLINE vfloat look_up(const float* tables, int32_t first, vint index) {
  return (vfloat)_mm512_permutex2var_ps(_mm512_loadu_ps(tables + first * 16), (__m512i)index,
                                        _mm512_loadu_ps(tables + first * 16 + 16));
}
#endif

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
