// Gate: out = x * a_w * a_h (+ x). Backward (reduce): dlogits = a (1 - a) * sum of grad * x * the other gate.
#include "apply.h"
#include "flat.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A> struct Gating {
  static constexpr int numbers = 1;
  static constexpr bool ahead = false;
  Numbers<A> lines[1];
  bool skip;
  COORDATT_MEMBER Vec<A> operator()(Vec<A> x, const Vec<A>* row, const Vec<A>* column) const {
    Vec<A> out = x * column[0] * row[0];  // in the reference's order
    if (skip) out += x;
    return out;
  }
};

template <bool NHWC, class X>
void gate(const PlaneArgs& a) {
  apply<NHWC, X>(a, Elements<X>{(const X*)a.x, a.x_step}, Gating<Acc<X>>{{{a.gates}}, a.skip});
}

// One nchw plane of grad and x: parts[h * stride] = lane-wise sum of t * a_w, columns[w] = sum of t * a_h, t = grad * x.
template <int NV, class X>
COORDATT_INLINE void reduce_plane(const X* grad, const X* x, int64_t height, int64_t width, const Acc<X>* gate_h,
                                  const Acc<X>* gate_w, Acc<X>* parts, int64_t stride, Acc<X>* columns) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr int64_t ahead = prefetch_bytes / sizeof(X);
  int64_t last = (width - 1) / n * n;
  Tail<A> tail(width - last);
  auto product = [&](int64_t w, bool cut) __attribute__((always_inline)) {
    prefetch(grad + w + ahead);
    prefetch(x + w + ahead);
    return cut ? load(grad + w, tail) * load(x + w, tail) : load(grad + w) * load(x + w);
  };
  if constexpr (NV > 0) {
    Vec<A> aw[NV];
    for (int j = 0; j < NV; ++j) aw[j] = load(gate_w + j * n);
    for (int64_t h0 = 0; h0 < height; h0 += 32) {  // partial sums of 32 keep the rounding error of tall planes down
      Vec<A> column[NV] = {};
      for (int64_t h = h0; h < min_of<int64_t>(h0 + 32, height); ++h, x += width, grad += width) {
        Vec<A> ah = splat(gate_h[h]), row = {};
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) {
          Vec<A> t = product(j * n, j == NV - 1);
          column[j] = fma(t, ah, column[j]);
          row = fma(t, aw[j], row);
        }
        store(parts + h * stride, row);
      }
      for (int j = 0; j < NV; ++j) store(columns + j * n, h0 ? load(columns + j * n) + column[j] : column[j]);
    }
  } else {
    auto rows = [&](auto count, int64_t h) __attribute__((always_inline)) {
      constexpr int HB = decltype(count)::value;
      Vec<A> ah[HB], row[HB] = {};
      for (int r = 0; r < HB; ++r) ah[r] = splat(gate_h[h + r]);
      for (int64_t w = 0; w <= last; w += n) {
        Vec<A> aw = load(gate_w + w), sum = {};
        for (int r = 0; r < HB; ++r) {
          Vec<A> t = product((h + r) * width + w, w == last);
          row[r] = fma(t, aw, row[r]);
          sum = r ? fma(t, ah[r], sum) : t * ah[r];
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
// Planes at most 16 wide, two rows to a vector, as the pool's.
template <bool WIDE, class X>
COORDATT_OUTLINE void reduce_narrow(const PlaneArgs& a) {
  const RowPairs<WIDE> pairs(a.h, a.w);
  const int64_t hp = padded(a.h);
  const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  float* gate_h = (float*)a.scratch;
  float* gate_w = gate_h + 16 * hp;
  float* columns = gate_w + 16 * 16;
  float* parts = columns + 16 * 16;
  for (int64_t c = a.c0; c < a.c1; c += 16) {
    int64_t count = min_of<int64_t>(16, a.c1 - c);
    const float* gates_h = (const float*)a.gates.h + c;
    const float* gates_w = (const float*)a.gates.w + c;
    rows_to_tile<float>(gates_h, a.gates.ld, a.h, count, 1.0f, gate_h, hp);
    rows_to_tile<float>(gates_w, a.gates.ld, a.w, count, 1.0f, gate_w, 16);
    for (int64_t i = 0; i < count; ++i) {
      const X* x = (const X*)a.x + (c + i) * a.x_step;
      const X* grad = (const X*)a.grad + (c + i) * a.grad_step;
      const __m512 aw = _mm512_broadcast_f32x8(_mm256_loadu_ps(gate_w + i * 16));
      const __m512 aw_high = _mm512_broadcast_f32x8(_mm256_loadu_ps(gate_w + i * 16 + 8));
      __m512 low = _mm512_setzero_ps(), high = low;
      for (int64_t p = 0; p < pairs.count; ++p, x += 2 * a.w, grad += 2 * a.w) {
        prefetch(x + prefetch_bytes / sizeof(X));
        prefetch(grad + prefetch_bytes / sizeof(X));
        const __m128i two = _mm_loadl_epi64((const __m128i*)(gate_h + i * hp + 2 * p));
        const __m512 ah = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(_mm_castsi128_ps(two)));
        __m512 t = _mm512_mul_ps(pairs.low(grad, p), pairs.low(x, p)), v = _mm512_mul_ps(t, aw);
        low = _mm512_fmadd_ps(t, ah, low);
        if (WIDE) {
          t = _mm512_mul_ps(pairs.high(grad, p), pairs.high(x, p));
          high = _mm512_fmadd_ps(t, ah, high);
          v = _mm512_fmadd_ps(t, aw_high, v);
        }
        _mm512_storeu_ps(parts + (p * 16 + i) * 16, v);
      }
      pairs.store_columns(columns + i * 16, low, high);
    }
    const Tail<float> present(count);
    pairs.each_row(parts, [&](int64_t h, __m512 sums) __attribute__((always_inline)) {
      vfloat slope = sigmoid_slope(load(gates_h + h * a.gates.ld, present));
      store((float*)a.dlogits.h + h * a.dlogits.ld + c, (vfloat)sums * slope, present);
    });
    tile_to_rows<float>(columns, 16, a.w, count, 1.0f, gates_w, (float*)a.dlogits.w + c, a.dlogits.ld);
  }
}
#endif

template <class X>
void reduce_nchw(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
#if defined(COORDATT_SIMD_AVX512)
  if constexpr (sizeof(A) == 4)
    if (RowPairs<true>::fits(a.h, a.w)) return a.w > 8 ? reduce_narrow<true, X>(a) : reduce_narrow<false, X>(a);
#endif
  const int64_t hp = padded(a.h), wp = padded(a.w);
  const bool together = a.h <= short_plane;
  A* gate_h = (A*)a.scratch;
  A* gate_w = gate_h + n * hp;
  A* rows = gate_w + n * wp;
  A* columns = rows + n * hp;
  A* parts = columns + n * wp;
  for (int64_t c = a.c0; c < a.c1; c += n) {
    int64_t count = min_of<int64_t>(n, a.c1 - c);
    const A* gates_h = (const A*)a.gates.h + c;
    const A* gates_w = (const A*)a.gates.w + c;
    rows_to_tile<A>(gates_h, a.gates.ld, a.h, count, A(1), gate_h, hp);
    rows_to_tile<A>(gates_w, a.gates.ld, a.w, count, A(1), gate_w, wp);
    with_row_vectors<A>(a.w, [&](auto nv) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) {
        reduce_plane<decltype(nv)::value>((const X*)a.grad + (c + i) * a.grad_step, (const X*)a.x + (c + i) * a.x_step, a.h,
                                          a.w, gate_h + i * hp, gate_w + i * wp, together ? parts + i * n : parts,
                                          together ? n * n : n, columns + i * wp);
        if (!together) sum_row_parts(parts, a.h, rows + i * hp);
      }
    });
    A* dlogits_h = (A*)a.dlogits.h + c;
    if (together) parts_to_rows<A>(parts, a.h, count, A(1), gates_h, dlogits_h, a.dlogits.ld);
    else tile_to_rows<A>(rows, hp, a.h, count, A(1), gates_h, dlogits_h, a.dlogits.ld);
    tile_to_rows<A>(columns, wp, a.w, count, A(1), gates_w, (A*)a.dlogits.w + c, a.dlogits.ld);
  }
}

// Channels [c, c + CV vectors) of HB rows of pixels; CV 0: the tail's channels.
template <int HB, int CV, class X>
COORDATT_INLINE void reduce_pixels(const PlaneArgs& a, int64_t h, int64_t c, const Tail<Acc<X>>& tail) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  constexpr bool partial = CV == 0;
  constexpr int vectors = partial ? 1 : CV;
  auto get = [&](auto* p) __attribute__((always_inline)) { return partial ? load(p, tail) : load(p); };
  auto put = [&](A* p, Vec<A> v) __attribute__((always_inline)) { if (partial) store(p, v, tail); else store(p, v); };
  Vec<A> ah[HB][vectors], row[HB][vectors] = {}, total[HB][vectors] = {};
  for (int r = 0; r < HB; ++r)
    for (int j = 0; j < vectors; ++j) ah[r][j] = get((const A*)a.gates.h + (h + r) * a.gates.ld + c + j * n);
  for (int64_t w0 = 0; w0 < a.w; w0 += 64) {  // as in the pool: partial sums of 64
    for (int64_t w = w0; w < min_of<int64_t>(w0 + 64, a.w); ++w)
      for (int j = 0; j < vectors; ++j) {
        A* column = (A*)a.dlogits.w + w * a.dlogits.ld + c + j * n;
        Vec<A> aw = get((const A*)a.gates.w + w * a.gates.ld + c + j * n), sum = {};
        for (int r = 0; r < HB; ++r) {
          int64_t pixel = (h + r) * a.w + w;
          Vec<A> t = get((const X*)a.grad + pixel * a.grad_step + c + j * n) * get((const X*)a.x + pixel * a.x_step + c + j * n);
          row[r][j] = fma(t, aw, row[r][j]);
          sum = r ? fma(t, ah[r][j], sum) : t * ah[r][j];
        }
        put(column, h ? get(column) + sum : sum);
      }
    for (int r = 0; r < HB; ++r)
      for (int j = 0; j < vectors; ++j) {
        total[r][j] += row[r][j];
        row[r][j] = Vec<A>{};
      }
  }
  for (int r = 0; r < HB; ++r)
    for (int j = 0; j < vectors; ++j)
      put((A*)a.dlogits.h + (h + r) * a.dlogits.ld + c + j * n, total[r][j] * sigmoid_slope(ah[r][j]));
}

// The columns' sums are complete: times the slope of their gate.
template <class A>
COORDATT_OUTLINE void slope_columns(const PlaneArgs& a, int64_t c0, int64_t c1) {
  constexpr int n = lanes<A>;
  for (int64_t w = 0; w < a.w; ++w)
    for (int64_t c = c0; c < c1; c += n) {
      const Tail<A> cut(min_of<int64_t>(n, c1 - c));
      A* column = (A*)a.dlogits.w + w * a.dlogits.ld + c;
      store(column, load(column, cut) * sigmoid_slope(load((const A*)a.gates.w + w * a.gates.ld + c, cut)), cut);
    }
}

constexpr int reduce_rows_together = 4;

template <int CV, class X>
COORDATT_INLINE void reduce_channels(const PlaneArgs& a, int64_t c) {
  using A = Acc<X>;
  const Tail<A> tail(CV ? 0 : a.c1 - c);
  int64_t h = 0;
  for (; h + reduce_rows_together <= a.h; h += reduce_rows_together)
    reduce_pixels<reduce_rows_together, CV, X>(a, h, c, tail);
  for (; h < a.h; ++h) reduce_pixels<1, CV, X>(a, h, c, tail);
  slope_columns<A>(a, c, CV ? c + CV * lanes<A> : a.c1);
}

// The same sums in the same order, walking memory straight through (as the pool does; 256 x 80 x 80: 887 us by blocks).
template <int HB, class X>
COORDATT_INLINE void reduce_lines(const PlaneArgs& a, int64_t h, Acc<X>* row) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  const int64_t width = a.c1 - a.c0, last = (width - 1) / n * n, ld = padded(width);
  const Tail<A> tail(width - last);
  const A* ah = (const A*)a.gates.h + h * a.gates.ld + a.c0;
  for (int64_t w0 = 0; w0 < a.w; w0 += 64) {
    const int64_t w1 = min_of<int64_t>(w0 + 64, a.w);
    for (int64_t w = w0; w < w1; ++w) {
      const X* x = (const X*)a.x + (h * a.w + w) * a.x_step + a.c0;
      const X* g = (const X*)a.grad + (h * a.w + w) * a.grad_step + a.c0;
      const A* aw = (const A*)a.gates.w + w * a.gates.ld + a.c0;
      A* column = (A*)a.dlogits.w + w * a.dlogits.ld + a.c0;
      auto part = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        Vec<A> gate_w = load(aw + c, cut...), sum = {};
        for (int r = 0; r < HB; ++r) {
          Vec<A> t = load(g + r * a.w * a.grad_step + c, cut...) * load(x + r * a.w * a.x_step + c, cut...);
          Vec<A> gate_h = load(ah + r * a.gates.ld + c, cut...);
          store(row + r * ld + c, fma(t, gate_w, w > w0 ? load(row + r * ld + c) : Vec<A>{}));
          sum = r ? fma(t, gate_h, sum) : t * gate_h;
        }
        store(column + c, h ? load(column + c, cut...) + sum : sum, cut...);
      };
      for (int64_t c = 0; c < last; c += n) part(c);
      part(last, tail);
    }
    for (int r = 0; r < HB; ++r)
      for (int64_t c = 0; c < width; c += n) {
        const Tail<A> cut(min_of<int64_t>(n, width - c));
        A* to = (A*)a.dlogits.h + (h + r) * a.dlogits.ld + a.c0 + c;
        Vec<A> v = load(row + r * ld + c);
        v = w0 ? load(to, cut) + v : Vec<A>{} + v;
        store(to, w1 == a.w ? v * sigmoid_slope(load(ah + r * a.gates.ld + c, cut)) : v, cut);
      }
  }
}

template <class X>
COORDATT_OUTLINE void reduce_through(const PlaneArgs& a) {
  Acc<X>* row = (Acc<X>*)a.scratch;
  int64_t h = 0;
  for (; h + reduce_rows_together <= a.h; h += reduce_rows_together) reduce_lines<reduce_rows_together, X>(a, h, row);
  for (; h < a.h; ++h) reduce_lines<1, X>(a, h, row);
  slope_columns<Acc<X>>(a, a.c0, a.c1);
}

template <class X>
void reduce_nhwc(const PlaneArgs& a) {
  constexpr int n = lanes<Acc<X>>;
  if (sums_walk<true, X>(a) == Walk::pixels) return reduce_through<X>(a);
  int64_t c = a.c0;
  for (; c + 2 * n <= a.c1; c += 2 * n) reduce_channels<2, X>(a, c);
  for (; c + n <= a.c1; c += n) reduce_channels<1, X>(a, c);
  if (c < a.c1) reduce_channels<0, X>(a, c);
}

template <class X>
COORDATT_INLINE void add(MapKernels& k) {
  k.gate[0] = gate<false, X>;
  k.gate[1] = gate<true, X>;
  k.gate_reduce[0] = reduce_nchw<X>;
  k.gate_reduce[1] = reduce_nhwc<X>;
}

}  // namespace

void add_gate(Kernels& k) {
  add<BFloat16>(k.map[(int)DType::bf16]);
#if !defined(COORDATT_SIMD_AVX512_BF16)  // which changes nothing else
  add<float>(k.map[(int)DType::f32]);
  add<double>(k.map[(int)DType::f64]);
  add<Float16>(k.map[(int)DType::f16]);
#endif
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
