// out = f(x, row, column): every element with the numbers that its row and its column say, over every kind of map.
//
// A functor f of an accumulate type A has
//   numbers                      how many numbers a line (a row or a column) says
//   lines[numbers]               where they stand, and what they are multiplied by (f does that itself in nhwc)
//   ahead                        whether x is fetched ahead of the walk
//   operator()(x, row, column)   x: what the source read; row, column: vectors [numbers]
// The source (walks.h: Elements, or Nothing) reads x; the results go into a map, or where another Stored leads them.
#pragma once

#include "walks.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A> struct Numbers {
  AxisRows rows;
  A of_row = 1, of_column = 1;
};

// For a functor that looks at no element.
struct Nothing {
  static constexpr bool reads = false, has_runs = true;
  static constexpr int row_vectors = 8;
  template <class... I> COORDATT_MEMBER int at(I...) const { return 0; }
  COORDATT_MEMBER void ahead(int64_t) const {}
  COORDATT_MEMBER void next(int64_t) {}
  COORDATT_MEMBER Nothing plane(int64_t) const { return {}; }
  COORDATT_MEMBER Nothing pixel(int64_t) const { return {}; }
  COORDATT_MEMBER Nothing run(int64_t) const { return {}; }
  COORDATT_MEMBER bool back_to_back(int64_t) const { return true; }
};

// Where results go: into a map. What takes its place has its members, and where a plane's or a pixel's go has those of To:
// put a vector, go on to the next row, have been given so many vectors since the last time, be done with the plane.
template <class X> struct Stored {
  static constexpr bool has_runs = true;
  X* data;
  int64_t step;  // as Map::step

  struct To {
    X* p;
    template <class V, class... Cut> COORDATT_MEMBER void put(int64_t i, V v, Cut... cut) const { store(p + i, v, cut...); }
    COORDATT_MEMBER void next(int64_t elements) { p += elements; }
    COORDATT_MEMBER void given(int64_t) {}
    COORDATT_MEMBER void done() {}
  };
  COORDATT_MEMBER To plane(int64_t c) const { return {data + c * step}; }
  COORDATT_MEMBER To pixel(int64_t i) const { return {data + i * step}; }
  COORDATT_MEMBER bool back_to_back(int64_t size) const { return step == size; }
  COORDATT_MEMBER void given(int64_t, int64_t) {}
  COORDATT_MEMBER void done(int64_t, int64_t) {}
};

// One plane, row by row. NV vectors a row, whose columns' numbers stay in registers, or 0 for any number.
template <int NV, class A, class P, class O, class F>
COORDATT_INLINE void apply_rows(P in, O out, int64_t height, int64_t width, const A* const* rows, const A* const* columns,
                                const F& f) {
  constexpr int n = lanes<A>, N = F::numbers;
  const int64_t last = (width - 1) / n * n;
  const Tail<A> tail(width - last);
  Vec<A> kept[NV ? NV : 1][N];
  for (int j = 0; j < NV; ++j)
    for (int k = 0; k < N; ++k) kept[j][k] = load(columns[k] + j * n);
  for (int64_t h = 0; h < height; ++h, in.next(width), out.next(width)) {
    Vec<A> row[N];
    for (int k = 0; k < N; ++k) row[k] = splat(rows[k][h]);
    auto part = [&](int64_t w, const Vec<A>* column, auto... cut) __attribute__((always_inline)) {
      if (F::ahead) in.ahead(w);
      out.put(w, f(in.at(w, cut...), row, column), cut...);
    };
    if constexpr (NV > 0) {
#pragma GCC unroll 8
      for (int j = 0; j < NV - 1; ++j) part(j * n, kept[j]);
      part((NV - 1) * n, kept[NV - 1], tail);
    } else {
      auto anywhere = [&](int64_t w, auto... cut) __attribute__((always_inline)) {
        Vec<A> column[N];
        for (int k = 0; k < N; ++k) column[k] = load(columns[k] + w);
        part(w, column, cut...);
      };
      for (int64_t w = 0; w < last; w += n) anywhere(w);
      anywhere(last, tail);
    }
    out.given(last / n + 1);
  }
  out.done();
}

// Small planes one at a time, the lines' numbers of each element looked up in registers by its row and column.
#if COORDATT_VBYTES == 64
template <bool PAIR> struct Table {  // one axis' numbers, in one vector or two
  __m512 low, high;
  COORDATT_MEMBER void set(const float* p) {
    low = _mm512_loadu_ps(p);
    high = PAIR ? _mm512_loadu_ps(p + 16) : _mm512_setzero_ps();
  }
  COORDATT_MEMBER vfloat operator[](vint index) const {
    return PAIR ? (vfloat)_mm512_permutex2var_ps(low, (__m512i)index, high)
                : (vfloat)_mm512_permutexvar_ps((__m512i)index, low);
  }
};
#elif COORDATT_VBYTES == 32
template <bool PAIR> struct Table {
  __m256 low;
  COORDATT_MEMBER void set(const float* p) { low = _mm256_loadu_ps(p); }
  COORDATT_MEMBER vfloat operator[](vint index) const {
    return (vfloat)_mm256_permutevar8x32_ps(low, (__m256i)index);
  }
};
#endif

COORDATT_INLINE vint load(const int32_t* p) { return (vint)load((const float*)p); }

// body(e, cut...) for every vector of `count` elements.
template <class A, class F> COORDATT_INLINE void each_vector(int64_t count, F&& body) {
  int64_t e = 0;
  for (; e + lanes<A> <= count; e += lanes<A>) body(e);
  if (e < count) body(e, Tail<A>(count - e));
}

#if COORDATT_VBYTES >= 32
template <bool PAIR, class S, class O, class F>
COORDATT_OUTLINE void apply_flat(const PlaneArgs& a, int64_t c0, int64_t count, const PlaneScratch<float> s, const S source,
                                 const O to, const F f) {
  constexpr int N = F::numbers;
  for (int64_t i = 0; i < count; ++i) {
    const auto in = source.plane(c0 + i);
    auto out = to.plane(c0 + i);
    Table<PAIR> rows[N], columns[N];
    for (int k = 0; k < N; ++k) {
      rows[k].set(s.h[k] + i * padded(a.h));
      columns[k].set(s.w[k] + i * padded(a.w));
    }
    each_vector<float>(a.h * a.w, [&](int64_t e, auto... cut) __attribute__((always_inline)) {
      const vint at_row = load(s.row + e), at_column = load(s.column + e);
      vfloat row[N], column[N];
      for (int k = 0; k < N; ++k) {
        row[k] = rows[k][at_row];
        column[k] = columns[k][at_column];
      }
      if (F::ahead) in.ahead(e);
      out.put(e, f(in.at(e, cut...), row, column), cut...);
      out.given(1);
    });
    out.done();
  }
}
#endif

template <class A, class S, class O, class F>
COORDATT_INLINE void apply_planes(const PlaneArgs& a, const S source, const O to, const F f, bool flat) {
  constexpr int n = lanes<A>;
  const int64_t hp = padded(a.h), wp = padded(a.w);
  const PlaneScratch<A> s(a.scratch, a.h, a.w, 0);
  if (flat)
    for (int64_t h = 0, i = 0; h < a.h; ++h)
      for (int64_t w = 0; w < a.w; ++w, ++i) {
        s.row[i] = (int32_t)h;
        s.column[i] = (int32_t)w;
      }
  for (int64_t c = a.c0; c < a.c1; c += n) {
    const int64_t count = min_of<int64_t>(n, a.c1 - c);
    for (int k = 0; k < F::numbers; ++k) {
      const Numbers<A>& from = f.lines[k];
      rows_to_tile<A>((const A*)from.rows.h + c, from.rows.ld, a.h, count, from.of_row, s.h[k], hp);
      rows_to_tile<A>((const A*)from.rows.w + c, from.rows.ld, a.w, count, from.of_column, s.w[k], wp);
    }
#if COORDATT_VBYTES >= 32
    if constexpr (sizeof(A) == 4) {
      if (flat && flat_limit > n && (a.h > n || a.w > n)) apply_flat<(flat_limit > n)>(a, c, count, s, source, to, f);
      else if (flat) apply_flat<false>(a, c, count, s, source, to, f);
      if (flat) continue;
    }
#endif
    with_row_vectors<A, S::row_vectors>(a.w, [&](auto nv) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        const A *rows[F::numbers], *columns[F::numbers];
        for (int k = 0; k < F::numbers; ++k) {
          rows[k] = s.h[k] + i * hp;
          columns[k] = s.w[k] + i * wp;
        }
        apply_rows<decltype(nv)::value, A>(source.plane(c + i), to.plane(c + i), a.h, a.w, rows, columns, f);
      }
    });
  }
}

#if defined(COORDATT_SIMD_AVX512)
// A run of 16 planes is whole, aligned vectors, each of at most two planes. A plane's table is [its rows' numbers | its
// columns']; an index below 16 looks in the vector's first plane, else in the next (960 x 7 x 7: the gate took 12.1 us
// plane by plane, spread 18).
struct RunIndices {
  static constexpr int planes = 16;
  int64_t h = 0, w = 0;
  int32_t row[planes * 64], column[planes * 64], first[planes * 64 / 16];  // H * W is 64 at most
  COORDATT_MEMBER void set(int64_t height, int64_t width) {
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
static thread_local RunIndices run_indices;  // made once a shape

// tables [17][16] of the planes [c, c + count).
COORDATT_INLINE void run_tables(const AxisRows& rows, int64_t c, int64_t count, int64_t h, int64_t w, vfloat scale,
                                float* tables) {
  const float* from[16];
  for (int l = 0; l < 16; ++l)
    from[l] = (l < h ? (const float*)rows.h + l * rows.ld : (const float*)rows.w + min_of<int64_t>(l - h, w - 1) * rows.ld) + c;
  pointers_to_tile<float>(from, count, scale, tables, 16);
}

COORDATT_INLINE vfloat look_up(const float* tables, int32_t first, vint index) {
  return (vfloat)_mm512_permutex2var_ps(_mm512_loadu_ps(tables + first * 16), (__m512i)index,
                                        _mm512_loadu_ps(tables + first * 16 + 16));
}

template <class S, class O, class F>
COORDATT_OUTLINE void apply_runs(const PlaneArgs& a, const S source, const O to, const F f) {
  constexpr int N = F::numbers;
  RunIndices& run = run_indices;
  run.set(a.h, a.w);
  const int64_t size = a.h * a.w;
  const PlaneScratch<float> s(a.scratch, a.h, a.w, 0);
  vfloat scale[N];
  for (int k = 0; k < N; ++k)
    for (int l = 0; l < 16; ++l) scale[k][l] = l < a.h ? f.lines[k].of_row : f.lines[k].of_column;
  for (int64_t c = a.c0; c < a.c1; c += RunIndices::planes) {
    const int64_t count = min_of<int64_t>(RunIndices::planes, a.c1 - c);
    for (int k = 0; k < N; ++k) run_tables(f.lines[k].rows, c, count, a.h, a.w, scale[k], s.h[k]);
    const auto in = source.run(c);
    const auto out = to.plane(c);
    each_vector<float>(count * size, [&](int64_t e, auto... cut) __attribute__((always_inline)) {
      const int32_t first = run.first[e / 16];
      const vint at_row = load(run.row + e), at_column = load(run.column + e);
      vfloat row[N], column[N];
      for (int k = 0; k < N; ++k) {
        row[k] = look_up(s.h[k], first, at_row);
        column[k] = look_up(s.h[k], first, at_column);
      }
      if (F::ahead) in.ahead(e);
      out.put(e, f(in.at(e, (at_row >> 4) + first, cut...), row, column), cut...);
    });
  }
}
#endif

template <class A, class S, class O, class F>
COORDATT_INLINE void apply_pixels(const PlaneArgs& a, const S source, O to, const F f) {
  constexpr int n = lanes<A>, N = F::numbers;
  const int64_t last = a.c0 + (a.c1 - a.c0 - 1) / n * n;
  const Tail<A> tail(a.c1 - last);
  for (int64_t h = 0; h < a.h; ++h)
    for (int64_t w = 0; w < a.w; ++w) {
      const auto in = source.pixel(h * a.w + w);
      auto out = to.pixel(h * a.w + w);
      const A *rows[N], *columns[N];
      for (int k = 0; k < N; ++k) {
        rows[k] = (const A*)f.lines[k].rows.h + h * f.lines[k].rows.ld;
        columns[k] = (const A*)f.lines[k].rows.w + w * f.lines[k].rows.ld;
      }
      auto part = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        Vec<A> row[N], column[N];
        for (int k = 0; k < N; ++k) {
          row[k] = load(rows[k] + c, cut...);
          column[k] = load(columns[k] + c, cut...);
        }
        if (F::ahead) in.ahead(c);
        out.put(c, f(in.at(c, cut...), row, column), cut...);
      };
      for (int64_t c = a.c0; c < last; c += n) part(c);
      part(last, tail);
      to.given(a.c0, a.c1);
    }
  to.done(a.c0, a.c1);
}

template <bool NHWC, class A, class S, class O, class F>
COORDATT_INLINE void apply(const PlaneArgs& a, const S source, const O to, const F f) {
  const int64_t size = a.h * a.w;
  const Walk walk = apply_walk<NHWC, S::reads, O::has_runs && S::has_runs, A>(
      a, to.back_to_back(size) && source.back_to_back(size));
  if constexpr (NHWC) return apply_pixels<A>(a, source, to, f);
#if defined(COORDATT_SIMD_AVX512)
  if constexpr (sizeof(A) == 4 && O::has_runs && S::has_runs)
    if (walk == Walk::run) return apply_runs(a, source, to, f);
#endif
  apply_planes<A>(a, source, to, f, walk == Walk::flat);
}

// The same, into a.out.
template <bool NHWC, class X, class S, class F>
COORDATT_INLINE void apply(const PlaneArgs& a, const S source, const F f) {
  apply<NHWC, Acc<X>>(a, source, Stored<X>{(X*)a.out, a.out_step}, f);
}

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
