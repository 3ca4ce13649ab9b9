// Pool: x -> row and column means. Backward (spread): dx = grad * a_h * a_w + dp_h / W + dp_w / H.
#include "flat.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// One nchw plane: parts[h * stride] = lane-wise sum of row h; columns[w] = sum over h. NV vectors a row, 0 for any number.
template <int NV, class X>
COORDATT_INLINE void pool_plane(const X* x, int64_t height, int64_t width, Acc<X>* parts, int64_t stride, Acc<X>* columns) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int64_t ahead = prefetch_bytes / sizeof(X);
  if constexpr (NV > 0) {
    Tail<A> tail(width - (NV - 1) * n);
    Vec<A> column[NV] = {};
    for (int64_t h = 0; h < height; ++h, x += width) {
      Vec<A> row = {};
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) {
        prefetch(x + j * n + ahead);
        Vec<A> v = j == NV - 1 ? load(x + j * n, tail) : load(x + j * n);
        column[j] += v;
        row = j ? row + v : v;
      }
      store(parts + h * stride, row);
    }
    for (int j = 0; j < NV; ++j) store(columns + j * n, column[j]);
  } else {
    int64_t full = width / n * n;
    Tail<A> tail(width - full);
    auto rows = [&](auto count, int64_t h) __attribute__((always_inline)) {
      constexpr int HB = decltype(count)::value;
      const X* p = x + h * width;
      Vec<A> row[HB] = {};
      for (int64_t w = 0; w <= full; w += n) {
        if (w == full && tail.k == 0) break;
        Vec<A> sum = {};
        for (int r = 0; r < HB; ++r) {
          prefetch(p + r * width + w + ahead);
          Vec<A> v = w == full ? load(p + r * width + w, tail) : load(p + r * width + w);
          row[r] += v;
          sum = r ? sum + v : v;
        }
        store(columns + w, h ? load(columns + w) + sum : sum);
      }
      for (int r = 0; r < HB; ++r) store(parts + (h + r) * stride, row[r]);
    };
    int64_t h = 0;
    for (; h + 4 <= height; h += 4) rows(std::integral_constant<int, 4>(), h);
    for (; h < height; ++h) rows(std::integral_constant<int, 1>(), h);
  }
}

#if defined(COORDATT_SIMD_AVX512)
// Planes at most 16 wide, two rows to a vector: half the shuffles of one row to a vector (960 x 7 x 7: 9.4 us, row by row
// 12.9 us; 384 x 14 x 14: 8.3 and 10.9 us).
template <bool WIDE, class X>
COORDATT_OUTLINE void pool_narrow(const PlaneArgs& a) {
  const RowPairs<WIDE> pairs(a.h, a.w);
  const __m512 by_w = _mm512_set1_ps(1.0f / (float)a.w);
  float* columns = (float*)a.scratch;
  float* parts = columns + 16 * 16;
  for (int64_t c = a.c0; c < a.c1; c += 16) {
    int64_t count = min_of<int64_t>(16, a.c1 - c);
    for (int64_t i = 0; i < count; ++i) {
      const X* x = (const X*)a.x + (c + i) * a.x_step;
      __m512 low = _mm512_setzero_ps(), high = low;
      for (int64_t p = 0; p < pairs.count; ++p, x += 2 * a.w) {
        prefetch(x + prefetch_bytes / sizeof(X));
        __m512 v = pairs.low(x, p);
        low = _mm512_add_ps(low, v);
        if (WIDE) {
          __m512 rest = pairs.high(x, p);
          high = _mm512_add_ps(high, rest);
          v = _mm512_add_ps(v, rest);
        }
        _mm512_storeu_ps(parts + (p * 16 + i) * 16, v);
      }
      pairs.store_columns(columns + i * 16, low, high);
    }
    float* rows = (float*)a.pooled.h + c;
    const __mmask16 present = (__mmask16)((1u << count) - 1u);
    pairs.each_row(parts, [&](int64_t h, __m512 sums) __attribute__((always_inline)) {
      _mm512_mask_storeu_ps(rows + h * a.pooled.ld, present, _mm512_mul_ps(sums, by_w));
    });
    tile_to_rows<float>(columns, 16, a.w, count, 1.0f / (float)a.h, nullptr, (float*)a.pooled.w + c, a.pooled.ld);
  }
}
#endif

template <class X>
void pool_nchw(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
#if defined(COORDATT_SIMD_AVX512)
  if constexpr (sizeof(A) == 4)
    if (RowPairs<true>::fits(a.h, a.w)) return a.w > 8 ? pool_narrow<true, X>(a) : pool_narrow<false, X>(a);
#endif
  const int64_t hp = padded(a.h), wp = padded(a.w);
  const bool together = a.h <= short_plane;
  const A by_w = A(1) / (A)a.w, by_h = A(1) / (A)a.full_h;
  A* rows = (A*)a.scratch;
  A* columns = rows + n * hp;
  A* parts = columns + n * wp;
  for (int64_t c = a.c0; c < a.c1; c += n) {
    int64_t count = min_of<int64_t>(n, a.c1 - c);
    with_row_vectors<A>(a.w, [&](auto nv) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        pool_plane<decltype(nv)::value>((const X*)a.x + (c + i) * a.x_step, a.h, a.w, together ? parts + i * n : parts,
                                        together ? n * n : n, columns + i * wp);
        if (!together) sum_row_parts(parts, a.h, rows + i * hp);
      }
    });
    A* pooled_h = (A*)a.pooled.h + c;
    if (together) parts_to_rows<A>(parts, a.h, count, by_w, nullptr, pooled_h, a.pooled.ld);
    else tile_to_rows<A>(rows, hp, a.h, count, by_w, nullptr, pooled_h, a.pooled.ld);
    tile_to_rows<A>(columns, wp, a.w, count, by_h, nullptr, (A*)a.pooled.w + c, a.pooled.ld);
  }
}

constexpr int pool_rows_together = COORDATT_VBYTES == 64 ? 4 : 2;  // as many as the registers hold

// Channels [c, c + CV vectors) of HB rows of pixels.
template <int HB, int CV, class X>
COORDATT_INLINE void pool_pixels(const PlaneArgs& a, int64_t h, int64_t c, const Tail<Acc<X>>& tail) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr bool partial = CV == 0;  // one vector, of tail.k channels
  constexpr int vectors = partial ? 1 : CV;
  Vec<A> row[HB][vectors] = {}, total[HB][vectors] = {};
  for (int64_t w0 = 0; w0 < a.w; w0 += 64) {  // partial sums of 64 keep the rounding error of wide rows down
    for (int64_t w = w0; w < min_of<int64_t>(w0 + 64, a.w); ++w) {
      A* column = (A*)a.pooled.w + w * a.pooled.ld + c;
      for (int j = 0; j < vectors; ++j) {
        Vec<A> sum = {};
        for (int r = 0; r < HB; ++r) {
          const X* p = (const X*)a.x + ((h + r) * a.w + w) * a.x_step + c + j * n;
          Vec<A> v = partial ? load(p, tail) : load(p);
          row[r][j] += v;
          sum = r ? sum + v : v;
        }
        if (h) sum = sum + (partial ? load(column, tail) : load(column + j * n));
        if (partial) store(column, sum, tail); else store(column + j * n, sum);
      }
    }
    for (int r = 0; r < HB; ++r)
      for (int j = 0; j < vectors; ++j) {
        total[r][j] += row[r][j];
        row[r][j] = Vec<A>{};
      }
  }
  A scale = A(1) / (A)a.w;
  for (int r = 0; r < HB; ++r)
    for (int j = 0; j < vectors; ++j) {
      A* to = (A*)a.pooled.h + (h + r) * a.pooled.ld + c + j * n;
      if (partial) store(to, total[r][j] * scale, tail); else store(to, total[r][j] * scale);
    }
}

template <int CV, class X>
COORDATT_INLINE void pool_channels(const PlaneArgs& a, int64_t c) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int HB = pool_rows_together;
  Tail<A> tail(CV ? 0 : a.c1 - c);
  int64_t h = 0;
  for (; h + HB <= a.h; h += HB) pool_pixels<HB, CV, X>(a, h, c, tail);
  for (; h < a.h; ++h) pool_pixels<1, CV, X>(a, h, c, tail);
  A scale = A(1) / (A)a.full_h;
  for (int64_t w = 0; w < a.w; ++w) {
    A* column = (A*)a.pooled.w + w * a.pooled.ld + c;
    if (CV == 0) store(column, load(column, tail) * scale, tail);
    for (int j = 0; j < CV; ++j) store(column + j * n, load(column + j * n) * scale);
  }
}

// The same sums in the same order, but walking memory straight through, all channels of a pixel before the next: for maps
// that no L2 holds (256 x 80 x 80: 442 us by channel blocks, whose strides the hardware does not prefetch).
template <int HB, class X>
COORDATT_INLINE void pool_lines(const PlaneArgs& a, int64_t h, Acc<X>* row) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  const int64_t width = a.c1 - a.c0, last = (width - 1) / n * n, ld = padded(width);
  const Tail<A> tail(width - last);
  const A scale = A(1) / (A)a.w;
  for (int64_t w0 = 0; w0 < a.w; w0 += 64) {
    const int64_t w1 = min_of<int64_t>(w0 + 64, a.w);
    for (int64_t w = w0; w < w1; ++w) {
      const X* x = (const X*)a.x + (h * a.w + w) * a.x_step + a.c0;
      A* column = (A*)a.pooled.w + w * a.pooled.ld + a.c0;
      auto part = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        Vec<A> sum = {};
        for (int r = 0; r < HB; ++r) {
          Vec<A> v = load(x + r * a.w * a.x_step + c, cut...);
          store(row + r * ld + c, w > w0 ? load(row + r * ld + c) + v : v);
          sum = r ? sum + v : v;
        }
        store(column + c, h ? sum + load(column + c, cut...) : sum, cut...);
      };
      for (int64_t c = 0; c < last; c += n) part(c);
      part(last, tail);
    }
    for (int r = 0; r < HB; ++r)
      for (int64_t c = 0; c < width; c += n) {
        const Tail<A> cut(min_of<int64_t>(n, width - c));
        A* to = (A*)a.pooled.h + (h + r) * a.pooled.ld + a.c0 + c;
        Vec<A> v = load(row + r * ld + c, cut);
        if (w0) v = load(to, cut) + v;
        store(to, w1 == a.w ? v * scale : v, cut);
      }
  }
}

template <class X>
COORDATT_OUTLINE void pool_through(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int HB = pool_rows_together;
  A* row = (A*)a.scratch;
  int64_t h = 0;
  for (; h + HB <= a.h; h += HB) pool_lines<HB, X>(a, h, row);
  for (; h < a.h; ++h) pool_lines<1, X>(a, h, row);
  const A scale = A(1) / (A)a.full_h;
  for (int64_t w = 0; w < a.w; ++w)
    for (int64_t c = a.c0; c < a.c1; c += n) {
      const Tail<A> cut(min_of<int64_t>(n, a.c1 - c));
      A* column = (A*)a.pooled.w + w * a.pooled.ld + c;
      store(column, load(column, cut) * scale, cut);
    }
}

template <class X>
void pool_nhwc(const PlaneArgs& a) {
  constexpr int n = lanes<Acc<X>>;
  constexpr int CV = COORDATT_VBYTES == 64 ? 4 : 2;
  if (walks_through<X>(a)) return pool_through<X>(a);
  int64_t c = a.c0;
  for (; c + CV * n <= a.c1; c += CV * n) pool_channels<CV, X>(a, c);
  for (; c + n <= a.c1; c += n) pool_channels<1, X>(a, c);
  if (c < a.c1) pool_channels<0, X>(a, c);
}

// One nchw plane of dx. grad may be null: then only the pooling's part.
template <int NV, bool GRAD, class X>
COORDATT_INLINE void spread_plane(const X* grad, X* dx, int64_t height, int64_t width, const Acc<X>* gate_h,
                                  const Acc<X>* gate_w, const Acc<X>* pooled_h, const Acc<X>* pooled_w, bool skip) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int64_t ahead = prefetch_bytes / sizeof(X);
  int64_t last = (width - 1) / n * n;
  Tail<A> tail(width - last);
  auto part = [&](int64_t w, Vec<A> aw, Vec<A> pw, Vec<A> ah, Vec<A> ph, bool cut) __attribute__((always_inline)) {
    Vec<A> v = pw + ph;
    if (GRAD) {
      prefetch(grad + w + ahead);
      Vec<A> g = cut ? load(grad + w, tail) : load(grad + w);
      v = fma(g * aw, ah, v);
      if (skip) v += g;
    }
    if (cut) store(dx + w, v, tail); else store(dx + w, v);
  };
  if constexpr (NV > 0) {
    Vec<A> aw[NV], pw[NV];
    for (int j = 0; j < NV; ++j) {
      if (GRAD) aw[j] = load(gate_w + j * n);
      pw[j] = load(pooled_w + j * n);
    }
    for (int64_t h = 0; h < height; ++h, grad += width, dx += width) {
      Vec<A> ah = splat(GRAD ? gate_h[h] : A(0)), ph = splat(pooled_h[h]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) part(j * n, aw[j], pw[j], ah, ph, j == NV - 1);
    }
  } else {
    for (int64_t h = 0; h < height; ++h, grad += width, dx += width) {
      Vec<A> ah = splat(GRAD ? gate_h[h] : A(0)), ph = splat(pooled_h[h]);
      for (int64_t w = 0; w < last; w += n)
        part(w, GRAD ? load(gate_w + w) : Vec<A>{}, load(pooled_w + w), ah, ph, false);
      part(last, GRAD ? load(gate_w + last) : Vec<A>{}, load(pooled_w + last), ah, ph, true);
    }
  }
}

// The same for the small planes [c, c + count), flat.
template <bool PAIR, class X>
COORDATT_OUTLINE void spread_flat(const PlaneArgs& a, int64_t c, int64_t count, const int32_t* row, const int32_t* column,
                                  const float* gate_h, const float* gate_w, const float* pooled_h, const float* pooled_w) {
#if defined(COORDATT_HAS_FLAT)
  constexpr int n = lanes<float>;
  const int64_t size = a.h * a.w, hp = padded(a.h), wp = padded(a.w);
  for (int64_t i = 0; i < count; ++i) {
    const X* grad = (const X*)a.grad + (c + i) * a.grad_step;
    X* dx = (X*)a.out + (c + i) * a.out_step;
    Table<PAIR> ah(gate_h + i * hp), aw(gate_w + i * wp), ph(pooled_h + i * hp), pw(pooled_w + i * wp);
    auto part = [&](int64_t e, auto... cut) __attribute__((always_inline)) {
      vint r = load(row + e), w = load(column + e);
      prefetch(grad + e + prefetch_bytes / sizeof(X));
      vfloat g = load(grad + e, cut...);
      vfloat v = pw[w] + ph[r];
      v = fma(g * aw[w], ah[r], v);
      if (a.skip) v += g;
      store(dx + e, v, cut...);
    };
    int64_t e = 0;
    for (; e + n <= size; e += n) part(e);
    if (e < size) part(e, Tail<float>(size - e));
  }
#else
  (void)a, (void)c, (void)count, (void)row, (void)column, (void)gate_h, (void)gate_w, (void)pooled_h, (void)pooled_w;
#endif
}

#if defined(COORDATT_SIMD_AVX512)
// Whole runs of small planes, as the gate's.
template <class X>
COORDATT_OUTLINE void spread_run(const PlaneArgs& a) {
  FlatRun& run = flat_run;
  run.set(a.h, a.w);
  const int64_t size = a.h * a.w;
  const float by_w = 1.0f / (float)a.w, by_h = 1.0f / (float)a.h;
  vfloat scale;
  for (int l = 0; l < 16; ++l) scale[l] = l < a.h ? by_w : by_h;
  float* gates = (float*)a.scratch;
  float* pooled = gates + (FlatRun::planes + 1) * 16;
  for (int64_t c = a.c0; c < a.c1; c += FlatRun::planes) {
    int64_t count = min_of<int64_t>(FlatRun::planes, a.c1 - c), elements = count * size;
    run_tables(a.gates, c, count, a.h, a.w, splat(1.0f), gates);
    run_tables(a.pooled, c, count, a.h, a.w, scale, pooled);
    const X* grad = (const X*)a.grad + c * size;
    X* dx = (X*)a.out + c * size;
    auto part = [&](int64_t e, auto... cut) __attribute__((always_inline)) {
      int32_t first = run.first[e / 16];
      vint row = load(run.row + e), column = load(run.column + e);
      prefetch(grad + e + prefetch_bytes / sizeof(X));
      vfloat g = load(grad + e, cut...);
      vfloat v = look_up(pooled, first, column) + look_up(pooled, first, row);
      v = fma(g * look_up(gates, first, column), look_up(gates, first, row), v);
      if (a.skip) v += g;
      store(dx + e, v, cut...);
    };
    int64_t e = 0;
    for (; e + 16 <= elements; e += 16) part(e);
    if (e < elements) part(e, Tail<float>(elements - e));
  }
}
#endif

template <bool GRAD, class X>
COORDATT_INLINE void spread_nchw_as(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
#if defined(COORDATT_SIMD_AVX512)
  if constexpr (sizeof(A) == 4 && GRAD)
    if (FlatRun::fits(a.h, a.w) && a.grad_step == a.h * a.w && a.out_step == a.grad_step) return spread_run<X>(a);
#endif
  int64_t hp = padded(a.h), wp = padded(a.w);
  A* gate_h = (A*)a.scratch;
  A* gate_w = gate_h + n * hp;
  A* pooled_h = gate_w + n * wp;
  A* pooled_w = pooled_h + n * hp;
  int32_t* row = (int32_t*)(pooled_w + n * wp);
  int32_t* column = row + flat_elements;
  const bool flat = GRAD && is_flat<A>(a.h, a.w), pair = a.h > n || a.w > n;
  if (flat) flat_indices(a.h, a.w, row, column);
  for (int64_t c = a.c0; c < a.c1; c += n) {
    int64_t count = min_of<int64_t>(n, a.c1 - c);
    if (GRAD) {
      rows_to_tile<A>((const A*)a.gates.h + c, a.gates.ld, a.h, count, A(1), gate_h, hp);
      rows_to_tile<A>((const A*)a.gates.w + c, a.gates.ld, a.w, count, A(1), gate_w, wp);
    }
    rows_to_tile<A>((const A*)a.pooled.h + c, a.pooled.ld, a.h, count, A(1) / (A)a.w, pooled_h, hp);
    rows_to_tile<A>((const A*)a.pooled.w + c, a.pooled.ld, a.w, count, A(1) / (A)a.full_h, pooled_w, wp);
    if constexpr (sizeof(A) == 4) {
      if (flat && pair) spread_flat<true, X>(a, c, count, row, column, gate_h, gate_w, pooled_h, pooled_w);
      else if (flat) spread_flat<false, X>(a, c, count, row, column, gate_h, gate_w, pooled_h, pooled_w);
      if (flat) continue;
    }
    with_row_vectors<A>(a.w, [&](auto nv) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i)
        spread_plane<decltype(nv)::value, GRAD>((const X*)a.grad + (c + i) * a.grad_step, (X*)a.out + (c + i) * a.out_step,
                                                a.h, a.w, gate_h + i * hp, gate_w + i * wp, pooled_h + i * hp,
                                                pooled_w + i * wp, a.skip);
    });
  }
}

template <class X>
void spread_nchw(const PlaneArgs& a) {
  if (a.grad) spread_nchw_as<true, X>(a); else spread_nchw_as<false, X>(a);
}

template <class X>
void spread_nhwc(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int64_t ahead = prefetch_bytes / sizeof(X);
  int64_t last = a.c0 + (a.c1 - a.c0 - 1) / n * n;
  Tail<A> tail(a.c1 - last);
  A by_w = A(1) / (A)a.w, by_h = A(1) / (A)a.full_h;
  for (int64_t h = 0; h < a.h; ++h)
    for (int64_t w = 0; w < a.w; ++w) {
      int64_t pixel = h * a.w + w;
      X* dx = (X*)a.out + pixel * a.out_step;
      const A* ph = (const A*)a.pooled.h + h * a.pooled.ld;
      const A* pw = (const A*)a.pooled.w + w * a.pooled.ld;
      const X* g = (const X*)a.grad + pixel * a.grad_step;
      const A* ah = (const A*)a.gates.h + h * a.gates.ld;
      const A* aw = (const A*)a.gates.w + w * a.gates.ld;
      auto part = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        Vec<A> v = fma(load(ph + c, cut...), splat(by_w), load(pw + c, cut...) * by_h);
        if (a.grad) {
          prefetch(g + c + ahead);
          Vec<A> gv = load(g + c, cut...);
          v = fma(gv * load(aw + c, cut...), load(ah + c, cut...), v);
          if (a.skip) v += gv;
        }
        store(dx + c, v, cut...);
      };
      for (int64_t c = a.c0; c < last; c += n) part(c);
      part(last, tail);
    }
}

template <class X>
void to_acc(const void* from, void* to, int64_t count) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store((A*)to + i, load((const X*)from + i));
  if (i < count) { Tail<A> tail(count - i); store((A*)to + i, load((const X*)from + i, tail), tail); }
}

template <class X>
void from_acc(const void* from, void* to, int64_t count) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  int64_t i = 0;
  for (; i + n <= count; i += n) store((X*)to + i, load((const A*)from + i));
  if (i < count) { Tail<A> tail(count - i); store((X*)to + i, load((const A*)from + i, tail), tail); }
}

template <class X>
COORDATT_INLINE void add(MapKernels& k) {
  k.pool[0] = pool_nchw<X>;
  k.pool[1] = pool_nhwc<X>;
  k.spread[0] = spread_nchw<X>;
  k.spread[1] = spread_nhwc<X>;
  k.to_acc = to_acc<X>;
  k.from_acc = from_acc<X>;
}

}  // namespace

void add_pool(Kernels& k) {
  add<BFloat16>(k.map[(int)DType::bf16]);
#if !defined(COORDATT_SIMD_AVX512_BF16)  // which changes nothing else
  add<float>(k.map[(int)DType::f32]);
  add<double>(k.map[(int)DType::f64]);
  add<Float16>(k.map[(int)DType::f16]);
#endif
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
