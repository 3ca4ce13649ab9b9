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
// (960 x 7 x 7: the gate took 12.1 us plane by plane.)
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

// tables [17][16] of the planes [c, c + count).
COORDATT_INLINE void run_tables(const AxisRows& rows, int64_t c, int64_t count, int64_t h, int64_t w, float* tables) {
  const float* from[16];
  for (int l = 0; l < 16; ++l)
    from[l] = (l < h ? (const float*)rows.h + l * rows.ld : (const float*)rows.w + min_of<int64_t>(l - h, w - 1) * rows.ld) + c;
  pointers_to_tile<float>(from, count, 1.0f, tables, 16);
}

COORDATT_INLINE vfloat look_up(const float* tables, int32_t first, vint index) {
  return (vfloat)_mm512_permutex2var_ps(_mm512_loadu_ps(tables + first * 16), (__m512i)index,
                                        _mm512_loadu_ps(tables + first * 16 + 16));
}
#endif

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
