// Planes at most 16 wide, two rows to a vector.
#pragma once

#include "walks.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

#if defined(COORDATT_SIMD_AVX512)
// Planes at most 16 wide, rows h and h + 1 in one vector, a half each: elements 0 to 7 in low, from 8 on in high.
template <bool WIDE> struct RowPairs {
  int64_t h, w, count;
  __mmask8 first, rest;
  static bool fits(int64_t h, int64_t w) { return w <= 16 && h <= short_plane; }
  RowPairs(int64_t height, int64_t width)
      : h(height), w(width), count((height + 1) / 2), first((__mmask8)((1u << (width < 8 ? width : 8)) - 1u)),
        rest((__mmask8)(width > 8 ? (1u << (width - 8)) - 1u : 0u)) {}
  template <class X>
  COORDATT_MEMBER __m512 both(const X* x, __mmask8 lanes, bool pair) const {
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
  template <class X> COORDATT_MEMBER __m512 low(const X* x, int64_t p) const {
    const bool pair = 2 * p + 1 < h;
    if constexpr (!WIDE && sizeof(X) == 4) return _mm512_maskz_expandloadu_ps((__mmask16)(pair ? first * 0x101u : first), x);
    return both(x, WIDE ? (__mmask8)0xff : first, pair);
  }
  template <class X> COORDATT_MEMBER __m512 high(const X* x, int64_t p) const {
    return both(x + 8, rest, 2 * p + 1 < h);
  }
  COORDATT_MEMBER void store_columns(float* columns, __m512 low, __m512 high) const {
    auto halves = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    _mm256_storeu_ps(columns, halves(low));
    if (WIDE) _mm256_storeu_ps(columns + 8, halves(high));
  }
  // parts [pair][16 planes][16] -> body(row, its sums of the 16 planes): as sum_each, but the halves stay apart.
  template <class F> COORDATT_MEMBER void each_row(const float* parts, F&& body) const {
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
#endif

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
