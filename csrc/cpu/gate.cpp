// Gate: out = x * a_w * a_h (+ x). Backward (reduce): dlogits = a (1 - a) * sum of grad * x * the other gate.
#include "apply.h"
#include "before.h"
#include "sums.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A> struct Gating {
  static constexpr int numbers = 1;
  static constexpr bool ahead = false;  // pool has just read x: fetching takes 4% longer, 64 x 24 x 8 14%
  Numbers<A> lines[1];
  bool skip;
  COORDATT_MEMBER Vec<A> operator()(Vec<A> x, const Vec<A>* row, const Vec<A>* column) const {
    Vec<A> out = x * column[0] * row[0];  // in the reference's order
    if (skip) out += x;
    return out;
  }
};

template <bool NHWC, class X, class R>
void gate(const PlaneArgs& a) {
  apply<NHWC, X>(a, Elements<X, R>{(const X*)a.x, a.x_step, R(a.before)}, Gating<Acc<X>>{{{a.gates}}, a.skip});
}

// The lines' sums of t = grad * x times the other line's gate, times the slope of the sigmoid at their own.
template <class A> struct Reducing {
  static constexpr bool gated = true, from_zero = true;
  static constexpr int rows_of_columns = 32;
  static constexpr int rows_together = 4, vectors = 2;
  AxisRows gates;
  COORDATT_MEMBER Vec<A> term(Vec<A> t, Vec<A> gate) const { return t * gate; }
  COORDATT_MEMBER Vec<A> add(Vec<A> sum, Vec<A> t, Vec<A> gate) const { return fma(t, gate, sum); }
  COORDATT_MEMBER Vec<A> row(Vec<A> sum, Vec<A> gate) const { return sum * (gate * (1 - gate)); }
  COORDATT_MEMBER Vec<A> column(Vec<A> sum, Vec<A> gate) const { return row(sum, gate); }
};

template <bool NHWC, class X, class R>
void reduce(const PlaneArgs& a) {
  const Elements<X> grad = {(const X*)a.grad, a.grad_step};
  const Elements<X, R> x = {(const X*)a.x, a.x_step, R(a.before)};
  sum_lines<NHWC, X>(a, product(grad, x), Reducing<Acc<X>>{a.gates}, a.dlogits);
}

template <class X, class R>
COORDATT_INLINE void add_reading(MapKernels& k, Read read) {
  k.gate[read][0] = gate<false, X, R>;
  k.gate[read][1] = gate<true, X, R>;
  k.gate_reduce[read][0] = reduce<false, X, R>;
  k.gate_reduce[read][1] = reduce<true, X, R>;
}

template <class X>
COORDATT_INLINE void add(MapKernels& k) {
  using A = Acc<X>;
  add_reading<X, AsIs>(k, as_is);
  add_reading<X, Normalised<A, Bounded<A>>>(k, bounded);
  add_reading<X, Normalised<A, Curved<A>>>(k, curved);
}

}  // namespace

void add_gate(Kernels& k) {
  for_each_type(k, [](auto x, MapKernels& map) { add<decltype(x)>(map); });
}

}  // namespace COORDATT_LEVEL
}  // namespace coordatt
