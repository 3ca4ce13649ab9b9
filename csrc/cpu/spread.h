// What comes back through the block to an element of the map: grad * a_h * a_w + dp_h / W + dp_w / H.
#pragma once

#include "apply.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class A> COORDATT_INLINE Numbers<A> means_of(const PlaneArgs& a) {
  return {a.pooled, A(1) / (A)a.w, A(1) / (A)a.full_h};
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
  explicit COORDATT_MEMBER Spreading(const PlaneArgs& a) : lines{{a.gates}, means_of<A>(a)}, skip(a.skip) {}
  COORDATT_MEMBER Vec<A> operator()(Vec<A> grad, const Vec<A>* row, const Vec<A>* column) const {
    const Means<NHWC, A> means{{lines[1]}};
    Vec<A> dx = fma(grad * column[0], row[0], means(0, row + 1, column + 1));
    if (skip) dx += grad;
    return dx;
  }
};

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
