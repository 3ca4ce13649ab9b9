// Row and column sums of f(x, gate) over every kind of map; the gate, if there is one, is the other line's: a row's sum takes
// the columns'.
//
// A functor f of an accumulate type A has
//   gated, gates                     whether there are gates, and where
//   term(x, gate), add(s, x, gate)   a sum's first term, and s with one more
//   row(s, gate), column(s, gate)    what a complete sum becomes; gate: the line's own
//   from_zero                        whether a row's sum starts from +0 or from its first term, which is an addition less
//   rows_of_columns                  how many rows a narrow plane's columns are summed over before those sums are; 0: all
//   rows_together, vectors           nhwc: rows and vectors of channels taken at a time
// The source reads x (walks.h). The order of every sum depends on the map's shape and f alone.
#pragma once

#include "walks.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// The longest stretch of a row that is summed before those sums are: it keeps the rounding error of wide rows down.
constexpr int64_t stretch = 64;

// Gates of row h, or of column w, and the channels from c on; zeros where there are none.
template <class A, class F, class... Cut> COORDATT_INLINE Vec<A> gate_h(const F& f, int64_t h, int64_t c, Cut... cut) {
  if constexpr (F::gated) return load((const A*)f.gates.h + h * f.gates.ld + c, cut...);
  else return Vec<A>{};
}
template <class A, class F, class... Cut> COORDATT_INLINE Vec<A> gate_w(const F& f, int64_t w, int64_t c, Cut... cut) {
  if constexpr (F::gated) return load((const A*)f.gates.w + w * f.gates.ld + c, cut...);
  else return Vec<A>{};
}

// What tile.h makes of the sums of line l, channels from c on.
template <class A, class F> struct RowsResult {
  F f;
  int64_t c;
  COORDATT_MEMBER Vec<A> operator()(Vec<A> sum, int64_t l, const Tail<A>& cut) const {
    return f.row(sum, gate_h<A>(f, l, c, cut));
  }
};
template <class A, class F> struct ColumnsResult {
  F f;
  int64_t c;
  COORDATT_MEMBER Vec<A> operator()(Vec<A> sum, int64_t l, const Tail<A>& cut) const {
    return f.column(sum, gate_w<A>(f, l, c, cut));
  }
};

// One plane: parts[h * stride] = lane-wise sum of row h, columns[w] = sum of column w. NV vectors a row, or 0 for any number.
template <int NV, class A, class P, class F>
COORDATT_INLINE void sum_plane(P in, int64_t height, int64_t width, const A* gate_h, const A* gate_w, A* parts, int64_t stride,
                               A* columns, const F& f) {
  constexpr int n = lanes<A>;
  auto gate_of_row = [&](int64_t h) __attribute__((always_inline)) { return F::gated ? splat(gate_h[h]) : Vec<A>{}; };
  auto gate_of_columns = [&](int64_t w) __attribute__((always_inline)) { return F::gated ? load(gate_w + w) : Vec<A>{}; };
  if constexpr (NV > 0) {
    const Tail<A> tail(width - (NV - 1) * n);
    Vec<A> gates[NV];
    for (int j = 0; j < NV; ++j) gates[j] = gate_of_columns(j * n);
    const int64_t most = F::rows_of_columns ? F::rows_of_columns : height;
    for (int64_t h0 = 0; h0 < height; h0 += most) {
      Vec<A> column[NV] = {};
      for (int64_t h = h0; h < min_of<int64_t>(h0 + most, height); ++h, in.next(width)) {
        const Vec<A> gate = gate_of_row(h);
        Vec<A> row = {};
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          in.ahead(j * n);
          const Vec<A> x = j == NV - 1 ? in.at(j * n, tail) : in.at(j * n);
          column[j] = f.add(column[j], x, gate);
          row = j || F::from_zero ? f.add(row, x, gates[j]) : f.term(x, gates[j]);
        }
        store(parts + h * stride, row);
      }
      for (int j = 0; j < NV; ++j) store(columns + j * n, h0 ? load(columns + j * n) + column[j] : column[j]);
    }
  } else {
    const int64_t full = width / n * n;
    const Tail<A> tail(width - full);
    auto rows = [&](auto count, int64_t h) __attribute__((always_inline)) {
      constexpr int R = decltype(count)::value;
      Vec<A> gate[R], row[R] = {};
      for (int r = 0; r < R; ++r) gate[r] = gate_of_row(h + r);
      auto part = [&](int64_t w, auto... cut) __attribute__((always_inline)) {
        const Vec<A> gates = gate_of_columns(w);
        Vec<A> sum = {};
        for (int r = 0; r < R; ++r) {
          in.ahead(r * width + w);
          const Vec<A> x = in.at(r * width + w, cut...);
          row[r] = f.add(row[r], x, gates);
          sum = r ? f.add(sum, x, gate[r]) : f.term(x, gate[r]);
        }
        store(columns + w, h ? load(columns + w) + sum : sum);
      };
      for (int64_t w = 0; w < full; w += n) part(w);
      if (tail.k) part(full, tail);
      for (int r = 0; r < R; ++r) store(parts + (h + r) * stride, row[r]);
      in.next(R * width);
    };
    int64_t h = 0;
    for (; h + 4 <= height; h += 4) rows(std::integral_constant<int, 4>(), h);
    for (; h < height; ++h) rows(std::integral_constant<int, 1>(), h);
  }
}

template <class X, class S, class F>
COORDATT_INLINE void sum_planes(const PlaneArgs& a, const S source, const F f, const AxisRows to) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  const int64_t hp = padded(a.h), wp = padded(a.w);
  const bool together = a.h <= short_plane;
  const PlaneScratch<A> s(a.scratch, a.h, a.w, 0);
  A *rows = s.h[1], *columns = s.w[1];
  for (int64_t c = a.c0; c < a.c1; c += n) {
    const int64_t count = min_of<int64_t>(n, a.c1 - c);
    if constexpr (F::gated) {
      rows_to_tile<A>((const A*)f.gates.h + c, f.gates.ld, a.h, count, A(1), s.h[0], hp);
      rows_to_tile<A>((const A*)f.gates.w + c, f.gates.ld, a.w, count, A(1), s.w[0], wp);
    }
    with_row_vectors<A, S::row_vectors>(a.w, [&](auto nv) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        sum_plane<decltype(nv)::value, A>(source.plane(c + i), a.h, a.w, s.h[0] + i * hp, s.w[0] + i * wp,
                                          together ? s.parts + i * n : s.parts, together ? n * n : n, columns + i * wp, f);
        if (!together) sum_row_parts(s.parts, a.h, rows + i * hp);
      }
    });
    const RowsResult<A, F> row = {f, c};
    const ColumnsResult<A, F> column = {f, c};
    if (together) parts_to_rows<A>(s.parts, a.h, count, row, (A*)to.h + c, to.ld);
    else tile_to_rows<A>(rows, hp, a.h, count, row, (A*)to.h + c, to.ld);
    tile_to_rows<A>(columns, wp, a.w, count, column, (A*)to.w + c, to.ld);
  }
}

#if defined(COORDATT_SIMD_AVX512)
// Rows h and h + 1 in one vector, a half each: elements 0 to 7 in low, from 8 on in high.
template <bool WIDE> struct RowPairs {
  int64_t h, w, count;
  __mmask8 first, rest;
  RowPairs(int64_t height, int64_t width)
      : h(height), w(width), count((height + 1) / 2), first((__mmask8)((1u << (width < 8 ? width : 8)) - 1u)),
        rest((__mmask8)(width > 8 ? (1u << (width - 8)) - 1u : 0u)) {}
  COORDATT_MEMBER bool whole(int64_t p) const { return 2 * p + 1 < h; }
  COORDATT_MEMBER __mmask16 lanes_of(__mmask8 half, int64_t p) const { return (__mmask16)(whole(p) ? half * 0x101u : half); }
  COORDATT_MEMBER __mmask16 low_lanes(int64_t p) const { return lanes_of(first, p); }
  COORDATT_MEMBER __mmask16 high_lanes(int64_t p) const { return lanes_of(rest, p); }
  template <class X> COORDATT_MEMBER vfloat both(const X* x, __mmask8 lanes, bool whole) const {
    if constexpr (sizeof(X) == 4) {
      __m512 v = _mm512_zextps256_ps512(_mm256_maskz_loadu_ps(lanes, x));
      return (vfloat)(whole ? _mm512_insertf32x8(v, _mm256_maskz_loadu_ps(lanes, x + w), 1) : v);
    } else {
      __m256i v = _mm256_zextsi128_si256(_mm_maskz_loadu_epi16(lanes, x));
      if (whole) v = _mm256_inserti128_si256(v, _mm_maskz_loadu_epi16(lanes, x + w), 1);
      return widen((vhalf)v, (X*)0);
    }
  }
  // x: element 0 of row 2 p.
  template <class X> COORDATT_MEMBER vfloat low(const X* x, int64_t p) const {
    if constexpr (!WIDE && sizeof(X) == 4) return (vfloat)_mm512_maskz_expandloadu_ps(low_lanes(p), x);
    return both(x, WIDE ? (__mmask8)0xff : first, whole(p));
  }
  template <class X> COORDATT_MEMBER vfloat high(const X* x, int64_t p) const { return both(x + 8, rest, whole(p)); }
  COORDATT_MEMBER void store_columns(float* columns, vfloat low, vfloat high) const {
    auto halves = [](__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); };
    _mm256_storeu_ps(columns, halves((__m512)low));
    if (WIDE) _mm256_storeu_ps(columns + 8, halves((__m512)high));
  }
  // parts [pair][16 planes][16] -> body(row, its sums of the 16 planes): as sum_each, but the halves stay apart.
  template <class F> COORDATT_MEMBER void each_row(const float* parts, F&& body) const {
    for (int64_t p = 0; p < count; ++p) {
      __m512 t[4];
      for (int i = 0; i < 4; ++i, parts += 64) t[i] = sum_quarters(parts);
      __m512 u = _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
      __m512 v = _mm512_add_ps(_mm512_shuffle_f32x4(t[2], t[3], 0x88), _mm512_shuffle_f32x4(t[2], t[3], 0xdd));
      body(2 * p, (vfloat)_mm512_shuffle_f32x4(u, v, 0x88));
      if (whole(p)) body(2 * p + 1, (vfloat)_mm512_shuffle_f32x4(u, v, 0xdd));
    }
  }
};

// Half the shuffles of one row to a vector (pool: 960 x 7 x 7: 9.4 us, row by row 12.9 us; 384 x 14 x 14: 8.3 and 10.9 us).
template <bool WIDE, class S, class F>
COORDATT_OUTLINE void sum_pairs(const PlaneArgs& a, const S source, const F f, const AxisRows to) {
  const RowPairs<WIDE> pairs(a.h, a.w);
  const int64_t hp = padded(a.h);
  const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  const PlaneScratch<float> s(a.scratch, a.h, a.w, 0);
  float* columns = s.w[1];
  for (int64_t c = a.c0; c < a.c1; c += 16) {
    const int64_t count = min_of<int64_t>(16, a.c1 - c);
    if constexpr (F::gated) {
      rows_to_tile<float>((const float*)f.gates.h + c, f.gates.ld, a.h, count, 1.0f, s.h[0], hp);
      rows_to_tile<float>((const float*)f.gates.w + c, f.gates.ld, a.w, count, 1.0f, s.w[0], 16);
    }
    for (int64_t i = 0; i < count; ++i) {
      auto in = source.plane(c + i);
      vfloat gates_low = {}, gates_high = {}, gate = {}, low = {}, high = {};
      if constexpr (F::gated) {
        gates_low = (vfloat)_mm512_broadcast_f32x8(_mm256_loadu_ps(s.w[0] + i * 16));
        gates_high = (vfloat)_mm512_broadcast_f32x8(_mm256_loadu_ps(s.w[0] + i * 16 + 8));
      }
      for (int64_t p = 0; p < pairs.count; ++p, in.next(2 * a.w)) {
        in.ahead(0);
        if constexpr (F::gated) {
          const __m128i two = _mm_loadl_epi64((const __m128i*)(s.h[0] + i * hp + 2 * p));
          gate = (vfloat)_mm512_permutexvar_ps(halves, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
        }
        vfloat x = in.by([&](const auto* at) { return pairs.low(at, p); }, pairs.low_lanes(p));
        vfloat row = f.term(x, gates_low);
        low = f.add(low, x, gate);
        if (WIDE) {
          x = in.by([&](const auto* at) { return pairs.high(at, p); }, pairs.high_lanes(p));
          high = f.add(high, x, gate);
          row = f.add(row, x, gates_high);
        }
        store(s.parts + (p * 16 + i) * 16, row);
      }
      pairs.store_columns(columns + i * 16, low, high);
    }
    const Tail<float> present(count);
    pairs.each_row(s.parts, [&](int64_t h, vfloat sum) __attribute__((always_inline)) {
      store((float*)to.h + h * to.ld + c, f.row(sum, gate_h<float>(f, h, c, present)), present);
    });
    tile_to_rows<float>(columns, 16, a.w, count, ColumnsResult<float, F>{f, c}, (float*)to.w + c, to.ld);
  }
}
#endif

// The columns' sums of channels [c0, c1) are complete.
template <class A, class F>
COORDATT_OUTLINE void finish_columns(const PlaneArgs& a, int64_t c0, int64_t c1, const F f, const AxisRows to) {
  constexpr int n = lanes<A>;
  for (int64_t w = 0; w < a.w; ++w)
    for (int64_t c = c0; c < c1; c += n) {
      const Tail<A> cut(min_of<int64_t>(n, c1 - c));
      A* column = (A*)to.w + w * to.ld + c;
      store(column, f.column(load(column, cut), gate_w<A>(f, w, c, cut)), cut);
    }
}

// R rows from h on, CV vectors of channels from c on.
template <int R, int CV, class A, class S, class F, class... Cut>
COORDATT_INLINE void sum_channels(const PlaneArgs& a, int64_t h, int64_t c, const S& source, const F& f, const AxisRows& to,
                                  Cut... cut) {
  constexpr int n = lanes<A>;
  Vec<A> gate[R][CV], row[R][CV] = {}, total[R][CV] = {};
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < CV; ++j) gate[r][j] = gate_h<A>(f, h + r, c + j * n, cut...);
  for (int64_t w0 = 0; w0 < a.w; w0 += stretch) {
    for (int64_t w = w0; w < min_of<int64_t>(w0 + stretch, a.w); ++w)
      for (int j = 0; j < CV; ++j) {
        A* column = (A*)to.w + w * to.ld + c + j * n;
        const Vec<A> gates = gate_w<A>(f, w, c + j * n, cut...);
        Vec<A> sum = {};
        for (int r = 0; r < R; ++r) {
          const Vec<A> x = source.pixel((h + r) * a.w + w).at(c + j * n, cut...);
          row[r][j] = f.add(row[r][j], x, gates);
          sum = r ? f.add(sum, x, gate[r][j]) : f.term(x, gate[r][j]);
        }
        store(column, h ? load(column, cut...) + sum : sum, cut...);
      }
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < CV; ++j) {
        total[r][j] += row[r][j];
        row[r][j] = Vec<A>{};
      }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < CV; ++j)
      store((A*)to.h + (h + r) * to.ld + c + j * n, f.row(total[r][j], gate[r][j]), cut...);
}

template <class X, class S, class F>
COORDATT_INLINE void sum_by_channels(const PlaneArgs& a, const S source, const F f, const AxisRows to) {
  using A = Acc<X>;
  constexpr int n = lanes<A>, R = F::rows_together, CV = F::vectors;
  auto all_rows = [&](auto vectors, int64_t c, auto... cut) __attribute__((always_inline)) {
    constexpr int V = decltype(vectors)::value;
    int64_t h = 0;
    for (; h + R <= a.h; h += R) sum_channels<R, V, A>(a, h, c, source, f, to, cut...);
    for (; h < a.h; ++h) sum_channels<1, V, A>(a, h, c, source, f, to, cut...);
    finish_columns<A>(a, c, min_of<int64_t>(c + V * n, a.c1), f, to);
  };
  int64_t c = a.c0;
  for (; c + CV * n <= a.c1; c += CV * n) all_rows(std::integral_constant<int, CV>(), c);
  for (; c + n <= a.c1; c += n) all_rows(std::integral_constant<int, 1>(), c);
  if (c < a.c1) all_rows(std::integral_constant<int, 1>(), c, Tail<A>(a.c1 - c));
}

// The same sums in the same order, walking memory straight through. R rows from h on; rows: their sums of a stretch.
template <int R, class A, class S, class F>
COORDATT_INLINE void sum_pixels(const PlaneArgs& a, int64_t h, const S& source, const F& f, const AxisRows& to, A* rows) {
  constexpr int n = lanes<A>;
  const int64_t width = a.c1 - a.c0, last = (width - 1) / n * n, ld = padded(width);
  const Tail<A> tail(width - last);
  for (int64_t w0 = 0; w0 < a.w; w0 += stretch) {
    const int64_t w1 = min_of<int64_t>(w0 + stretch, a.w);
    for (int64_t w = w0; w < w1; ++w) {
      A* column = (A*)to.w + w * to.ld + a.c0;
      auto part = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        const Vec<A> gates = gate_w<A>(f, w, a.c0 + c, cut...);
        Vec<A> sum = {};
        for (int r = 0; r < R; ++r) {
          const Vec<A> x = source.pixel((h + r) * a.w + w).at(a.c0 + c, cut...), gate = gate_h<A>(f, h + r, a.c0 + c, cut...);
          A* row = rows + r * ld + c;
          store(row, w > w0 ? f.add(load(row), x, gates) : F::from_zero ? f.add(Vec<A>{}, x, gates) : f.term(x, gates));
          sum = r ? f.add(sum, x, gate) : f.term(x, gate);
        }
        store(column + c, h ? load(column + c, cut...) + sum : sum, cut...);
      };
      for (int64_t c = 0; c < last; c += n) part(c);
      part(last, tail);
    }
    for (int r = 0; r < R; ++r)
      for (int64_t c = 0; c < width; c += n) {
        const Tail<A> cut(min_of<int64_t>(n, width - c));
        A* row = (A*)to.h + (h + r) * to.ld + a.c0 + c;
        Vec<A> sum = load(rows + r * ld + c);
        if (w0 || F::from_zero) sum = (w0 ? load(row, cut) : Vec<A>{}) + sum;
        store(row, w1 == a.w ? f.row(sum, gate_h<A>(f, h + r, a.c0 + c, cut)) : sum, cut);
      }
  }
}

template <class X, class S, class F>
COORDATT_OUTLINE void sum_by_pixels(const PlaneArgs& a, const S source, const F f, const AxisRows to) {
  using A = Acc<X>;
  constexpr int R = F::rows_together;
  static_assert(R <= most_rows_together);
  A* rows = PlaneScratch<A>(a.scratch, a.h, a.w, 0).rows;
  int64_t h = 0;
  for (; h + R <= a.h; h += R) sum_pixels<R>(a, h, source, f, to, rows);
  for (; h < a.h; ++h) sum_pixels<1>(a, h, source, f, to, rows);
  finish_columns<A>(a, a.c0, a.c1, f, to);
}

// to: the sums' places in rows of the middle.
template <bool NHWC, class X, class S, class F>
COORDATT_INLINE void sum_lines(const PlaneArgs& a, const S source, const F f, const AxisRows to) {
  const Walk walk = sums_walk<NHWC, X>(a);
  if constexpr (NHWC) {
    if (walk == Walk::pixels) return sum_by_pixels<X>(a, source, f, to);
    return sum_by_channels<X>(a, source, f, to);
  } else {
#if defined(COORDATT_SIMD_AVX512)
    if constexpr (sizeof(Acc<X>) == 4)
      if (walk == Walk::pairs) return a.w > 8 ? sum_pairs<true>(a, source, f, to) : sum_pairs<false>(a, source, f, to);
#endif
    sum_planes<X>(a, source, f, to);
  }
}

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
