// Mix: the channel-mixing middle. Two matrix kernels serve it forward and backward, both with channels in the lanes:
// dot (contract over channels) and axpy (produce channels); the rest is elementwise over [rows, M].
#include "activation.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A>
void dot(const DotArgs& d) {
  constexpr int n = lanes<A>;
  constexpr int MM = n < 4 ? n : 4, MR = n / MM;  // one vector of results
  const int64_t full = d.depth / n * n;
  Tail<A> tail(d.depth - full);
  for (int64_t m = 0; m < d.cols; m += MM) {
    const A* b[MM];
    for (int j = 0; j < MM; ++j) b[j] = (const A*)d.b + min_of(m + j, d.cols - 1) * d.ldb;
    for (int64_t r = 0; r < d.rows; r += MR) {
      const A* a[MR];
      for (int i = 0; i < MR; ++i) a[i] = (const A*)d.a + min_of(r + i, d.rows - 1) * d.lda;
      Vec<A> acc[MR * MM] = {};
      auto step = [&](int64_t c, auto... cut) __attribute__((always_inline)) {
        Vec<A> av[MR];
        for (int i = 0; i < MR; ++i) av[i] = load(a[i] + c, cut...);
        for (int j = 0; j < MM; ++j) {
          Vec<A> bv = load(b[j] + c, cut...);
          for (int i = 0; i < MR; ++i) acc[i * MM + j] = fma(av[i], bv, acc[i * MM + j]);
        }
      };
      for (int64_t c = 0; c < full; c += n) step(c);
      if (tail.k) step(full, tail);
      A sums[n];
      store(sums, sum_each<A>(acc));
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < MM; ++j)
          if (r + i < d.rows && m + j < d.cols)
            ((A*)d.out)[(r + i) * d.ldo + m + j] = sums[i * MM + j] + (d.bias ? ((const A*)d.bias)[m + j] : A(0));
    }
  }
}

// IR rows of out, CV vectors of channels (CV 0: the tail's channels).
template <int IR, int CV, class A>
COORDATT_INLINE void axpy_tile(const AxpyArgs& x, int64_t i, int64_t c, const Tail<A>& tail) {
  constexpr int n = lanes<A>;
  constexpr bool partial = CV == 0;
  constexpr int vectors = partial ? 1 : CV;
  auto get = [&](const A* p) __attribute__((always_inline)) { return partial ? load(p, tail) : load(p); };
  auto put = [&](A* p, Vec<A> v) __attribute__((always_inline)) { if (partial) store(p, v, tail); else store(p, v); };
  const A* a = (const A*)x.a + i * x.a_row;
  const A* b = (const A*)x.b + c;
  Vec<A> acc[IR][vectors] = {};
  for (int64_t k = 0; k < x.depth; ++k, a += x.a_depth, b += x.ldb) {
    Vec<A> bv[vectors];
    for (int j = 0; j < vectors; ++j) bv[j] = get(b + j * n);
#pragma GCC unroll 8
    for (int r = 0; r < IR; ++r) {
      Vec<A> s = splat(a[r * x.a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < vectors; ++j) acc[r][j] = fma(s, bv[j], acc[r][j]);
    }
  }
  A* out = (A*)x.out + i * x.ldo + c;
#pragma GCC unroll 8
  for (int r = 0; r < IR; ++r)
#pragma GCC unroll 8
    for (int j = 0; j < vectors; ++j) {
      A* to = out + r * x.ldo + j * n;
      Vec<A> v = acc[r][j];
      if (x.bias) v += get((const A*)x.bias + c + j * n);
      if (x.accumulate) v += get(to);
      put(to, v);
    }
  if (x.sigmoid)
    for (int r = 0; r < IR; ++r)
      for (int j = 0; j < vectors; ++j) {
        A* to = out + r * x.ldo + j * n;
        put(to, sigmoid(get(to)));
      }
}

template <int CV, class A>
COORDATT_INLINE void axpy_columns(const AxpyArgs& x, int64_t c, const Tail<A>& tail) {
  constexpr int IR = COORDATT_VBYTES == 64 ? 8 : 6;  // IR x 2 accumulators, within 32 or 16 registers
  int64_t i = 0;
  for (; i + IR <= x.rows; i += IR) axpy_tile<IR, CV, A>(x, i, c, tail);
  switch (x.rows - i) {
    case 7: axpy_tile<7, CV, A>(x, i, c, tail); break;
    case 6: axpy_tile<6, CV, A>(x, i, c, tail); break;
    case 5: axpy_tile<5, CV, A>(x, i, c, tail); break;
    case 4: axpy_tile<4, CV, A>(x, i, c, tail); break;
    case 3: axpy_tile<3, CV, A>(x, i, c, tail); break;
    case 2: axpy_tile<2, CV, A>(x, i, c, tail); break;
    case 1: axpy_tile<1, CV, A>(x, i, c, tail); break;
    default: break;
  }
}

template <class A>
void axpy(const AxpyArgs& x) {
  constexpr int n = lanes<A>;
  constexpr int CV = 2;
  int64_t c = x.c0;
  Tail<A> tail((x.c1 - c) % n);
  for (; c + CV * n <= x.c1; c += CV * n) axpy_columns<CV, A>(x, c, tail);
  for (; c + n <= x.c1; c += n) axpy_columns<1, A>(x, c, tail);
  if (c < x.c1) axpy_columns<0, A>(x, c, tail);
}

// to[i] = from[i % m] over m whole vectors, so that a flat walk over [rows, M] finds its column's value in place.
template <class A>
COORDATT_INLINE void repeat(const void* from, int64_t m, A* to) {
  const A* f = (const A*)from;
  for (int64_t i = 0, j = 0; i < m * lanes<A>; ++i, j = j + 1 == m ? 0 : j + 1) to[i] = f[j];
}

template <Activation F, class A>
COORDATT_INLINE void act_as(const ActArgs& a) {
  constexpr int n = lanes<A>;
  const int64_t count = a.rows * a.m, period = a.m * n;
  A* scale = (A*)a.scratch;
  A* shift = scale + period;
  A* mean = shift + period;
  repeat<A>(a.scale, a.m, scale);
  repeat<A>(a.shift, a.m, shift);
  repeat<A>(a.mean, a.m, mean);
  const A* z = (const A*)a.z;
  A* y = (A*)a.y;
  auto part = [&](int64_t i, int64_t j, auto... cut) __attribute__((always_inline)) {
    store(y + i, activate<F>(fma(load(z + i, cut...) - load(mean + j), load(scale + j), load(shift + j))), cut...);
  };
  int64_t i = 0, j = 0;
  for (; i + n <= count; i += n, j = j + n == period ? 0 : j + n) part(i, j);
  if (i < count) part(i, j, Tail<A>(count - i));
}

template <Activation F, class A>
COORDATT_INLINE void act_backward_as(const ActArgs& a) {
  constexpr int n = lanes<A>;
  const int64_t count = a.rows * a.m, period = a.m * n;
  A* scale = (A*)a.scratch;
  A* shift = scale + period;
  A* mean = shift + period;
  A* sum = mean + period;
  A* sum_dev = sum + period;
  repeat<A>(a.scale, a.m, scale);
  repeat<A>(a.shift, a.m, shift);
  repeat<A>(a.mean, a.m, mean);
  for (int64_t i = 0; i < 2 * period; ++i) sum[i] = 0;
  const A* z = (const A*)a.z;
  A* y = (A*)a.y;
  A* dy = (A*)a.dy;
  auto part = [&](int64_t i, int64_t j, auto... cut) __attribute__((always_inline)) {
    Vec<A> dev = load(z + i, cut...) - load(mean + j), u = fma(dev, load(scale + j), load(shift + j));
    Vec<A> du = activate_backward<F>(u, load(dy + i, cut...));
    store(dy + i, du, cut...);
    store(y + i, activate<F>(u), cut...);
    store(sum + j, load(sum + j, cut...) + du, cut...);
    store(sum_dev + j, fma(du, dev, load(sum_dev + j, cut...)), cut...);
  };
  int64_t i = 0, j = 0;
  for (; i + n <= count; i += n, j = j + n == period ? 0 : j + n) part(i, j);
  if (i < count) part(i, j, Tail<A>(count - i));
  for (int64_t k = 0, m = 0; k < period; ++k, m = m + 1 == a.m ? 0 : m + 1) {
    a.sum_du[m] += (double)sum[k];
    a.sum_du_dev[m] += (double)sum_dev[k];
  }
}

template <class A>
void act(const ActArgs& a) {
  with_activation(a.activation, [&](auto which) __attribute__((always_inline)) { act_as<decltype(which)::value, A>(a); });
}

template <class A>
void act_backward(const ActArgs& a) {
  with_activation(a.activation, [&](auto which) __attribute__((always_inline)) { act_backward_as<decltype(which)::value, A>(a); });
}

template <class A>
void stats(const NormArgs& a) {
  const A* z = (const A*)a.z;
  A* mean = (A*)a.mean;
  A* var = (A*)a.var;
  for (int64_t m0 = 0; m0 < a.m; m0 += 64) {
    int64_t count = min_of<int64_t>(64, a.m - m0);
    double sum[64] = {}, square[64] = {};
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t m = 0; m < count; ++m) sum[m] += (double)z[r * a.m + m0 + m];
    for (int64_t m = 0; m < count; ++m) sum[m] /= (double)a.rows;
    for (int64_t r = 0; r < a.rows; ++r)
      for (int64_t m = 0; m < count; ++m) {
        double d = (double)z[r * a.m + m0 + m] - sum[m];
        square[m] += d * d;
      }
    if (a.moments) {
      for (int64_t m = 0; m < count; ++m) {
        a.moments[m0 + m] = sum[m];
        a.moments[a.m + m0 + m] = square[m];
      }
      continue;
    }
    for (int64_t m = 0; m < count; ++m) {
      mean[m0 + m] = (A)sum[m];
      var[m0 + m] = (A)(square[m] / (double)a.rows);
    }
  }
}

template <class A>
void norm_backward(const NormArgs& a) {
  const A *z = (const A*)a.z, *mean = (const A*)a.mean, *scale = (const A*)a.scale, *offset = (const A*)a.offset,
          *slope = (const A*)a.slope;
  A* du = (A*)a.du;
  if (!offset) {
#pragma GCC ivdep
    for (int64_t r = 0; r < a.rows; ++r)
#pragma GCC ivdep
      for (int64_t m = 0; m < a.m; ++m) du[r * a.m + m] *= scale[m];
    return;
  }
#pragma GCC ivdep
  for (int64_t r = 0; r < a.rows; ++r)
#pragma GCC ivdep
    for (int64_t m = 0; m < a.m; ++m) {
      int64_t i = r * a.m + m;
      du[i] = scale[m] * (du[i] - offset[m] - (z[i] - mean[m]) * slope[m]);
    }
}

template <class A>
void sigmoid_all(void* data, int64_t count) {
  constexpr int n = lanes<A>;
  A* p = (A*)data;
  int64_t i = 0;
  for (; i + n <= count; i += n) store(p + i, sigmoid(load(p + i)));
  if (i < count) { Tail<A> tail(count - i); store(p + i, sigmoid(load(p + i, tail)), tail); }
}

template <class A>
void sum_rows(const void* a, int64_t lda, int64_t rows, int64_t c0, int64_t c1, void* out) {
  constexpr int n = lanes<A>;
  for (int64_t c = c0; c < c1; c += n) {
    Tail<A> tail(min_of<int64_t>(n, c1 - c));
    const A* p = (const A*)a + c;
    Vec<A> total = {};
    for (int64_t r = 0; r < rows;) {  // sums of 16 rows, of 16 such sums, and of those: as exact as a pairwise sum
      Vec<A> middle = {};
      for (int64_t end = min_of<int64_t>(r + 256, rows); r < end;) {
        Vec<A> sum = {};
        for (int64_t stop = min_of<int64_t>(r + 16, end); r < stop; ++r) sum += load(p + r * lda, tail);
        middle += sum;
      }
      total += middle;
    }
    store((A*)out + c, total, tail);
  }
}

template <class A>
void transpose_all(const void* a, int64_t lda, int64_t rows, int64_t cols, void* out, int64_t ldo) {
  constexpr int n = lanes<A>;
  for (int64_t r0 = 0; r0 < rows; r0 += n) {
    int64_t nr = min_of<int64_t>(n, rows - r0);
    Tail<A> row_tail(nr);
    for (int64_t c0 = 0; c0 < cols; c0 += n) {
      int64_t nc = min_of<int64_t>(n, cols - c0);
      Tail<A> col_tail(nc);
      Vec<A> v[n];
      A edge[n * n];
      const A* from[n];
      for (int i = 0; i < n; ++i) from[i] = (const A*)a + min_of(r0 + i, rows - 1) * lda + c0;
      if (nc < n)
        for (int i = 0; i < n; ++i) {
          store(edge + i * n, load(from[i], col_tail));
          from[i] = edge + i * n;
        }
      transpose_rows<A>(from, v);
      for (int i = 0; i < n; ++i)
        if (i < nc) {
          A* to = (A*)out + (c0 + i) * ldo + r0;
          if (nr == n) store(to, v[i]); else store(to, v[i], row_tail);
        }
    }
  }
}

template <class A>
COORDATT_INLINE void add(MixKernels& k) {
  k.dot = dot<A>;
  k.axpy = axpy<A>;
  k.act = act<A>;
  k.act_backward = act_backward<A>;
  k.stats = stats<A>;
  k.norm_backward = norm_backward<A>;
  k.sigmoid = sigmoid_all<A>;
  k.sum_rows = sum_rows<A>;
  k.transpose = transpose_all<A>;
}

}  // namespace

void add_mix(Kernels& k) {
  add<float>(k.mix[0]);
  add<double>(k.mix[1]);
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
