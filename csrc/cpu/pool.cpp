// Pool: x -> row and column means. Backward (spread): dx = grad * a_h * a_w + dp_h / W + dp_w / H.
#include "apply.h"
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
  if (sums_walk<true, X>(a) == Walk::pixels) return pool_through<X>(a);
  int64_t c = a.c0;
  for (; c + CV * n <= a.c1; c += CV * n) pool_channels<CV, X>(a, c);
  for (; c + n <= a.c1; c += n) pool_channels<1, X>(a, c);
  if (c < a.c1) pool_channels<0, X>(a, c);
}

// dx of the pooling alone: what the rows' and columns' means pass back.
template <bool NHWC, class A> struct Means {
  static constexpr int numbers = 1;
  static constexpr bool ahead = true;
  Numbers<A> lines[1];
  COORDATT_MEMBER Vec<A> operator()(int, const Vec<A>* row, const Vec<A>* column) const {
    return NHWC ? fma(row[0], splat(lines[0].of_row), column[0] * lines[0].of_column) : column[0] + row[0];
  }
};

// The same beside the gate's part, grad * a_w * a_h (+ grad).
template <bool NHWC, class A> struct Spreading {
  static constexpr int numbers = 2;
  static constexpr bool ahead = true;
  Numbers<A> lines[2];  // gates; means
  bool skip;
  COORDATT_MEMBER Vec<A> operator()(Vec<A> grad, const Vec<A>* row, const Vec<A>* column) const {
    const Means<NHWC, A> means{{lines[1]}};
    Vec<A> dx = fma(grad * column[0], row[0], means(0, row + 1, column + 1));
    if (skip) dx += grad;
    return dx;
  }
};

template <bool NHWC, class X>
void spread(const PlaneArgs& a) {
  using A = Acc<X>;
  const Numbers<A> means = {a.pooled, A(1) / (A)a.w, A(1) / (A)a.full_h};
  if (!a.grad) return apply<NHWC, X>(a, Nothing(), Means<NHWC, A>{{means}});
  apply<NHWC, X>(a, Elements<X>{(const X*)a.grad, a.grad_step}, Spreading<NHWC, A>{{{a.gates}, means}, a.skip});
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
  k.spread[0] = spread<false, X>;
  k.spread[1] = spread<true, X>;
  k.plane_scratch = plane_scratch<X>;
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
