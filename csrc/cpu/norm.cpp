// Norm: the normalisation before the block. Forward (moments): a channel's mean and squared deviations. Backward, with dv
// what comes back to the map (spread.h) and du = dv times the activation's slope: sums of du and du * (x - mean), then
// dx = scale * (du - mean of du - (x - mean) * its share).
#include "before.h"
#include "spread.h"

#include <math.h>

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// A mean and the squares' sum about it, joined stretch by stretch in float64 (Chan, Golub, LeVeque 1983).
struct Moments {
  double mean = 0, square = 0;
  COORDATT_MEMBER void join(int64_t before, int64_t count, double other_mean, double other_square) {
    if (!before) {
      mean = other_mean;
      square = other_square;
      return;
    }
    const double all = (double)(before + count), share = (double)count / all, delta = other_mean - mean;
    square += other_square + delta * delta * ((double)before * share);
    const double moved = mean + delta * share;
    mean = moved - moved == 0 ? moved : mean * (1 - share) + other_mean * share;  // an infinite mean stays one
  }
};

// What one stretch of count elements adds: pivot is its rounded mean, the sums are of x - pivot and its square.
COORDATT_INLINE void join_stretch(Moments& m, int64_t before, int64_t count, double pivot, double sum, double square) {
  const double off = sum / (double)count;
  double rest = square - sum * off;
  if (rest < 0) rest = 0;
  m.join(before, count, off - off == 0 ? pivot + off : pivot, rest);
}

// The sum of all lanes, halves by halves.
template <class V> COORDATT_INLINE double over_lanes(V v) {
#if defined(COORDATT_SIMD_AVX512)
  if constexpr (sizeof(v[0]) == 4) return (double)_mm512_reduce_add_ps((__m512)v);
  else return _mm512_reduce_add_pd((__m512d)v);
#else
  typename std::decay<decltype(v[0])>::type part[sizeof(V) / sizeof(v[0])];
  memcpy(part, &v, sizeof(V));
  for (int half = sizeof(V) / sizeof(v[0]) / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return (double)part[0];
#endif
}

// Elements of a plane that are read twice in a row, the second time from L1.
constexpr int64_t twice = 4096;

template <class X>
COORDATT_INLINE void moments_of_planes(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>, K = 4;
  const int64_t size = a.h * a.w;
  for (int64_t c = a.c0; c < a.c1; ++c) {
    const X* plane = (const X*)a.x + c * a.x_step;
    Moments all;
    for (int64_t e0 = 0; e0 < size; e0 += twice) {
      const int64_t count = min_of(twice, size - e0), full = count / n * n, unrolled = count / (K * n) * (K * n);
      const Tail<A> tail(count - full);
      const X* x = plane + e0;
      Vec<A> sum[K] = {};
      int64_t i = 0;
      for (; i < unrolled; i += K * n)
        for (int k = 0; k < K; ++k) {
          prefetch(x + i + k * n + prefetch_bytes / sizeof(X));
          sum[k] += load(x + i + k * n);
        }
      for (; i < full; i += n) sum[0] += load(x + i);
      if (tail.k) sum[0] += load(x + i, tail);
      const A mean = (A)(over_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / (double)count);
      Vec<A> off[K] = {}, square[K] = {};
      auto add = [&](int k, Vec<A> d) __attribute__((always_inline)) {
        off[k] += d;
        square[k] = fma(d, d, square[k]);
      };
      for (i = 0; i < unrolled; i += K * n)
        for (int k = 0; k < K; ++k) add(k, load(x + i + k * n) - mean);
      for (; i < full; i += n) add(0, load(x + i) - mean);
      if (tail.k) add(0, first(load(x + i, tail) - mean, tail));
      join_stretch(all, e0, count, (double)mean, over_lanes((off[0] + off[1]) + (off[2] + off[3])),
                   over_lanes((square[0] + square[1]) + (square[2] + square[3])));
    }
    a.sum[c] = all.mean;
    a.square[c] = all.square;
  }
}

// Pixels that are read twice in a row: 32 of 1,000 channels are half an L2 of 256 KB. (bits)
constexpr int64_t pixels_twice = 32;

template <class X>
COORDATT_INLINE void moments_of_pixels(const PlaneArgs& a) {
  using A = Acc<X>;
  constexpr int n = lanes<A>;
  const int64_t size = a.h * a.w;
  for (int64_t c = a.c0; c < a.c1; ++c) a.sum[c] = a.square[c] = 0;
  for (int64_t e0 = 0; e0 < size; e0 += pixels_twice) {
    const int64_t count = min_of(pixels_twice, size - e0);
    const X* x = (const X*)a.x + e0 * a.x_step;
    auto group = [&](auto vectors, int64_t c, auto... cut) __attribute__((always_inline)) {
      constexpr int V = decltype(vectors)::value;
      Vec<A> mean[V] = {}, off[V] = {}, square[V] = {};
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < V; ++j) {
          const X* at = x + i * a.x_step + c + j * n;
          prefetch(at + pixels_twice * a.x_step);
          mean[j] += load(at, cut...);
        }
      for (int j = 0; j < V; ++j) mean[j] *= A(1) / (A)count;
      for (int64_t i = 0; i < count; ++i)
        for (int j = 0; j < V; ++j) {
          const Vec<A> d = load(x + i * a.x_step + c + j * n, cut...) - mean[j];
          off[j] += d;
          square[j] = fma(d, d, square[j]);
        }
      for (int j = 0; j < V; ++j)
        for (int l = 0; l < n && c + j * n + l < a.c1; ++l) {
          double &to_mean = a.sum[c + j * n + l], &to_square = a.square[c + j * n + l];
          Moments m;
          m.mean = to_mean;
          m.square = to_square;
          join_stretch(m, e0, count, (double)mean[j][l], (double)off[j][l], (double)square[j][l]);
          to_mean = m.mean;
          to_square = m.square;
        }
    };
    int64_t c = a.c0;
    for (; c + 4 * n <= a.c1; c += 4 * n) group(std::integral_constant<int, 4>(), c);
    for (; c + n <= a.c1; c += n) group(std::integral_constant<int, 1>(), c);
    if (c < a.c1) group(std::integral_constant<int, 1>(), c, Tail<A>(a.c1 - c));
  }
}

template <bool NHWC, class X>
void moments(const PlaneArgs& a) {
  if constexpr (NHWC) moments_of_pixels<X>(a);
  else moments_of_planes<X>(a);
}

// An element of x, with its channel's numbers.
template <class A> struct Seen {
  Vec<A> x, u, scale, mean, offset, slope;
};

// In AsIs' place (walks.h).
template <class A> struct Seeing {
  static constexpr int row_vectors = 2;
  BeforeArgs b;
  explicit COORDATT_MEMBER Seeing(const BeforeArgs& before) : b(before) {}
  struct Of {
    Vec<A> scale, shift, mean, offset, slope;
    template <class... Cut> COORDATT_MEMBER Seen<A> operator()(Vec<A> x, Cut...) const {
      return {x, fma(x, scale, shift), scale, mean, offset, slope};
    }
  };
  template <class F> COORDATT_MEMBER Of by(F&& number) const {
    return {number(b.scale), number(b.shift), number(b.mean), b.offset ? number(b.offset) : Vec<A>{},
            b.offset ? number(b.slope) : Vec<A>{}};
  }
  COORDATT_MEMBER Of channel(int64_t c) const {
    return by([&](const void* p) __attribute__((always_inline)) { return splat(((const A*)p)[c]); });
  }
  template <class... Cut> COORDATT_MEMBER Of channels(int64_t c, Cut... cut) const {
    return by([&](const void* p) __attribute__((always_inline)) { return load((const A*)p + c, cut...); });
  }
  COORDATT_MEMBER Of channels_of(int64_t, vint) const = delete;
};

// grad and x of an element.
template <class A> struct Point {
  Vec<A> grad;
  Seen<A> seen;
};
struct Pointing {
  template <class A> COORDATT_MEMBER Point<A> operator()(Vec<A> grad, const Seen<A>& seen) const { return {grad, seen}; }
};

template <class X>
COORDATT_INLINE Both<Elements<X>, Elements<X, Seeing<Acc<X>>>, Pointing> points(const PlaneArgs& a) {
  return {{(const X*)a.grad, a.grad_step}, {(const X*)a.x, a.x_step, Seeing<Acc<X>>(a.before)}};
}

template <class A> struct Two {
  Vec<A> du, dev;
};

// du of an element: what comes back to the map, through the activation.
template <bool NHWC, class A, class Act> struct Sloping : Spreading<NHWC, A> {
  Act act;
  explicit COORDATT_MEMBER Sloping(const PlaneArgs& a) : Spreading<NHWC, A>(a), act(a.before.activation) {}
  COORDATT_MEMBER Vec<A> du(const Point<A>& p, const Vec<A>* row, const Vec<A>* column) const {
    return act.slope(p.seen.u, Spreading<NHWC, A>::operator()(p.grad, row, column));
  }
};

// du, and du * (x - mean).
template <bool NHWC, class A, class Act> struct Slopes : Sloping<NHWC, A, Act> {
  using Sloping<NHWC, A, Act>::Sloping;
  COORDATT_MEMBER Two<A> operator()(const Point<A>& p, const Vec<A>* row, const Vec<A>* column) const {
    const Vec<A> du = this->du(p, row, column);
    return {du, du * (p.seen.x - p.seen.mean)};
  }
};

template <bool NHWC, class A, class Act> struct Passing : Sloping<NHWC, A, Act> {
  bool batch;
  explicit COORDATT_MEMBER Passing(const PlaneArgs& a) : Sloping<NHWC, A, Act>(a), batch(a.before.offset) {}
  COORDATT_MEMBER Vec<A> operator()(const Point<A>& p, const Vec<A>* row, const Vec<A>* column) const {
    const Seen<A>& s = p.seen;
    const Vec<A> du = this->du(p, row, column);
    if (!batch) return s.scale * du;
    return fma(s.scale, du, -fma(s.x - s.mean, s.slope, s.offset));
  }
};

// Vectors, or pixels, added up in the accumulate type before they go into a float64. (bits)
constexpr int64_t summed_vectors = 16;

// In Stored's place (apply.h): sums of what is put, by channel.
template <class A> struct Summed {
  static constexpr bool has_runs = false;
  double *du, *dev;  // [C]
  A* parts;          // nhwc: [2][ld], of some pixels
  int64_t ld, begin, pixels = 0;

  struct Plane {
    double *to_du, *to_dev;
    Vec<A> du = {}, dev = {};
    double sum_du = 0, sum_dev = 0;
    int64_t vectors = 0;
    template <class... Cut> COORDATT_MEMBER void put(int64_t, const Two<A>& v, Cut... cut) {
      du += first(v.du, cut...);
      dev += first(v.dev, cut...);
    }
    COORDATT_MEMBER void next(int64_t) {}
    COORDATT_MEMBER void given(int64_t count) {
      if ((vectors += count) >= summed_vectors) flush();
    }
    COORDATT_MEMBER void flush() {
      sum_du += over_lanes(du);
      sum_dev += over_lanes(dev);
      du = dev = Vec<A>{};
      vectors = 0;
    }
    COORDATT_MEMBER void done() {
      flush();
      *to_du = sum_du;
      *to_dev = sum_dev;
    }
  };
  struct Pixel {
    A *du, *dev;
    template <class... Cut> COORDATT_MEMBER void put(int64_t c, const Two<A>& v, Cut... cut) const {
      store(du + c, load(du + c, cut...) + v.du, cut...);
      store(dev + c, load(dev + c, cut...) + v.dev, cut...);
    }
  };
  COORDATT_MEMBER Plane plane(int64_t c) const { return {du + c, dev + c}; }
  COORDATT_MEMBER Pixel pixel(int64_t) const { return {parts - begin, parts + ld - begin}; }
  COORDATT_MEMBER bool back_to_back(int64_t) const { return false; }
  COORDATT_MEMBER void given(int64_t c0, int64_t c1) {
    if (++pixels == summed_vectors) done(c0, c1);
  }
  COORDATT_MEMBER void done(int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; ++c) {
      du[c] += (double)parts[c - begin];
      dev[c] += (double)parts[ld + c - begin];
      parts[c - begin] = parts[ld + c - begin] = 0;
    }
    pixels = 0;
  }
};

template <bool NHWC, class X, class Act>
void before_sums(const PlaneArgs& a) {
  using A = Acc<X>;
  Summed<A> to = {a.sum, a.square, (A*)a.scratch, padded(a.c1 - a.c0), a.c0};
  if constexpr (NHWC) {
    for (int64_t i = 0; i < 2 * to.ld; ++i) to.parts[i] = 0;
    for (int64_t c = a.c0; c < a.c1; ++c) a.sum[c] = a.square[c] = 0;
  }
  apply<NHWC, A>(a, points<X>(a), to, Slopes<NHWC, A, Act>(a));
}

template <bool NHWC, class X, class Act>
void before_spread(const PlaneArgs& a) {
  apply<NHWC, X>(a, points<X>(a), Passing<NHWC, Acc<X>, Act>(a));
}

template <class X, class Act>
COORDATT_INLINE void add_reading(MapKernels& k, Read read) {
  k.before_sums[read][0] = before_sums<false, X, Act>;
  k.before_sums[read][1] = before_sums<true, X, Act>;
  k.before_spread[read][0] = before_spread<false, X, Act>;
  k.before_spread[read][1] = before_spread<true, X, Act>;
}

template <class X>
COORDATT_INLINE void add(MapKernels& k) {
  using A = Acc<X>;
  k.moments[0] = moments<false, X>;
  k.moments[1] = moments<true, X>;
  add_reading<X, Bounded<A>>(k, bounded);
  add_reading<X, Curved<A>>(k, curved);
}

}  // namespace

void add_norm(Kernels& k) {
  for_each_type(k, [](auto x, MapKernels& map) { add<decltype(x)>(map); });
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
