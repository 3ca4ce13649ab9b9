// Pool: x -> row and column means. Backward (spread): dx = grad * a_h * a_w + dp_h / W + dp_w / H.
#include "before.h"
#include "spread.h"
#include "sums.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A> struct Averaging {
  static constexpr bool gated = false, from_zero = false;
  static constexpr int rows_of_columns = 0;
  static constexpr int rows_together = COORDATT_VBYTES == 64 ? 4 : 2, vectors = rows_together;  // what the registers hold
  A by_w, by_h;
  COORDATT_MEMBER Vec<A> term(Vec<A> x, Vec<A>) const { return x; }
  COORDATT_MEMBER Vec<A> add(Vec<A> sum, Vec<A> x, Vec<A>) const { return sum + x; }
  COORDATT_MEMBER Vec<A> row(Vec<A> sum, Vec<A>) const { return sum * by_w; }
  COORDATT_MEMBER Vec<A> column(Vec<A> sum, Vec<A>) const { return sum * by_h; }
};

template <bool NHWC, class X, class R>
void pool(const PlaneArgs& a) {
  using A = Acc<X>;
  const Averaging<A> means = {A(1) / (A)a.w, A(1) / (A)a.full_h};
  sum_lines<NHWC, X>(a, Elements<X, R>{(const X*)a.x, a.x_step, R(a.before)}, means, a.pooled);
}

template <bool NHWC, class X>
void spread(const PlaneArgs& a) {
  using A = Acc<X>;
  if (!a.grad) return apply<NHWC, X>(a, Nothing(), Means<NHWC, A>{{means_of<A>(a)}});
  apply<NHWC, X>(a, Elements<X>{(const X*)a.grad, a.grad_step}, Spreading<NHWC, A>(a));
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

template <class X, class R>
COORDATT_INLINE void add_reading(MapKernels& k, Read read) {
  k.pool[read][0] = pool<false, X, R>;
  k.pool[read][1] = pool<true, X, R>;
}

template <class X>
COORDATT_INLINE void add(MapKernels& k) {
  using A = Acc<X>;
  add_reading<X, AsIs>(k, as_is);
  add_reading<X, Normalised<A, Bounded<A>>>(k, bounded);
  add_reading<X, Normalised<A, Curved<A>>>(k, curved);
  k.spread[0] = spread<false, X>;
  k.spread[1] = spread<true, X>;
  k.plane_scratch = plane_scratch<X>;
  k.to_acc = to_acc<X>;
  k.from_acc = from_acc<X>;
}

}  // namespace

void add_pool(Kernels& k) {
  for_each_type(k, [](auto x, MapKernels& map) { add<decltype(x)>(map); });
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
