// The activations and their slopes.
#pragma once

#include "simd.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

template <class V> COORDATT_INLINE V clamp(V u, float low, float high) {
  V lo = low - V{}, hi = high - V{};
  u = u < lo ? lo : u;
  return u > hi ? hi : u;
}

// The value of an activation; comparisons are written so that NaN passes through.
template <Activation F, class V> COORDATT_INLINE V activate(V u) {
  if constexpr (F == Activation::hard_swish) {
    return u * (clamp(u + 3.0f, 0.0f, 6.0f) * (decltype(u[0] + 0))(1.0 / 6.0));
  } else if constexpr (F == Activation::silu) {
    return u * sigmoid(u);
  } else if constexpr (F == Activation::relu) {
    return u < 0.0f ? V{} : u;
  } else {
    static_assert(F == Activation::relu6);
    return clamp(u, 0.0f, 6.0f);
  }
}

// dy times the slope. Where that is zero by a comparison the result is selected, as in PyTorch's kernels: NaN or infinity
// times zero would be NaN.
template <Activation F, class V> COORDATT_INLINE V activate_backward(V u, V dy) {
  V zero = {};
  if constexpr (F == Activation::hard_swish) {
    auto sixth = (decltype(u[0] + 0))(1.0 / 6.0);
    V slope = u * sixth;
    slope = u >= 3.0f ? zero : slope;
    V du = dy * (slope + clamp(u + 3.0f, 0.0f, 6.0f) * sixth);
    return u <= -3.0f ? zero : du;
  } else if constexpr (F == Activation::silu) {
    V s = sigmoid(u);
    return dy * (s * (1.0f + u * (1.0f - s)));
  } else if constexpr (F == Activation::relu) {
    return u <= 0.0f ? zero : dy;
  } else {
    static_assert(F == Activation::relu6);
    dy = u > 0.0f ? dy : zero;  // NaN passes none, as in PyTorch's vectors
    return u < 6.0f ? dy : zero;
  }
}

// body(integral_constant of the activation).
template <class F> COORDATT_INLINE auto with_activation(Activation a, F&& body) {
  switch (a) {
    case Activation::hard_swish: return body(std::integral_constant<Activation, Activation::hard_swish>());
    case Activation::silu: return body(std::integral_constant<Activation, Activation::silu>());
    case Activation::relu: return body(std::integral_constant<Activation, Activation::relu>());
    case Activation::relu6: return body(std::integral_constant<Activation, Activation::relu6>());
  }
  __builtin_unreachable();  // call_of refuses all others
}

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
