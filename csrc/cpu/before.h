// What a kernel reads where a normalisation and an activation stand before the block: act(scale x + shift).
#pragma once

#include "activation.h"
#include "walks.h"

namespace coordatt {
namespace COORDATT_LEVEL {
namespace {

// The first lanes as they are, zeros beyond.
COORDATT_INLINE vfloat first(vfloat v) { return v; }
COORDATT_INLINE vdouble first(vdouble v) { return v; }
#if defined(COORDATT_SIMD_AVX512)
COORDATT_INLINE vfloat first(vfloat v, __mmask16 lanes) { return (vfloat)_mm512_maskz_mov_ps(lanes, (__m512)v); }
COORDATT_INLINE vfloat first(vfloat v, const Tail<float>& t) { return first(v, (__mmask16)t.mask); }
COORDATT_INLINE vdouble first(vdouble v, const Tail<double>& t) {
  return (vdouble)_mm512_maskz_mov_pd((__mmask8)t.mask, (__m512d)v);
}
#elif defined(COORDATT_SIMD_AVX2)
template <class V, class A> COORDATT_INLINE V first(V v, const Tail<A>& t) { return (V)((vint)v & (vint)t.mask); }
#else
template <class V, class A> COORDATT_INLINE V first(V v, const Tail<A>& t) {
  for (int i = t.k; i < lanes<A>; ++i) v[i] = 0;
  return v;
}
#endif

// Activations that only cut off: none, relu, relu6. A bound that is NaN is none, for nothing is beyond it.
template <class A> struct Bounded {
  Vec<A> low, high;
  bool nan_passes;  // its gradient; relu6 lets none through, as in PyTorch's vectors
  explicit COORDATT_MEMBER Bounded(int activation)
      : low(splat(activation == no_activation ? (A)__builtin_nan("") : A(0))),
        high(splat(activation == (int)Activation::relu6 ? A(6) : (A)__builtin_nan(""))),
        nan_passes(activation != (int)Activation::relu6) {}
  COORDATT_MEMBER Vec<A> value(Vec<A> u) const {
#if defined(COORDATT_SIMD_AVX512)
    // Where either is NaN both give the second, u.
    if constexpr (sizeof(A) == 4) return (vfloat)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)u));
#elif defined(COORDATT_SIMD_AVX2)
    if constexpr (sizeof(A) == 4) return (vfloat)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)u));
#endif
    u = u < low ? low : u;
    return u > high ? high : u;
  }
  COORDATT_MEMBER Vec<A> slope(Vec<A> u, Vec<A> dv) const {
    const Vec<A> zero = {};
    dv = u <= low ? zero : dv;
    dv = u >= high ? zero : dv;
    return nan_passes ? dv : u == u ? dv : zero;
  }
};

// All others.
template <class A> struct Curved {
  Activation which;
  explicit COORDATT_MEMBER Curved(int activation) : which((Activation)activation) {}
  COORDATT_MEMBER Vec<A> value(Vec<A> u) const {
    return with_activation(which, [&](auto of) __attribute__((always_inline)) {
      if constexpr (is_curved(decltype(of)::value)) return activate<decltype(of)::value>(u);
      else return u;
    });
  }
  COORDATT_MEMBER Vec<A> slope(Vec<A> u, Vec<A> dv) const {
    return with_activation(which, [&](auto of) __attribute__((always_inline)) {
      if constexpr (is_curved(decltype(of)::value)) return activate_backward<decltype(of)::value>(u, dv);
      else return dv;
    });
  }
};

// In AsIs' place (walks.h).
template <class A, class Act> struct Normalised {
  static constexpr int row_vectors = 2;  // each more is an instantiation of every walk
  const A *scale, *shift;
  Act act;
  explicit COORDATT_MEMBER Normalised(const BeforeArgs& b)
      : scale((const A*)b.scale), shift((const A*)b.shift), act(b.activation) {}

  // Of one channel: lanes beyond a cut hold act(shift). Of a pixel's they hold act(0 * 0 + 0), which is zero.
  template <bool CUT> struct Of {
    Vec<A> scale, shift;
    Act act;
    template <class... Cut> COORDATT_MEMBER Vec<A> operator()(Vec<A> x, Cut... cut) const {
      const Vec<A> y = act.value(fma(x, scale, shift));
      if constexpr (CUT) return first(y, cut...);
      return y;
    }
  };
  COORDATT_MEMBER Of<true> channel(int64_t c) const { return {splat(scale[c]), splat(shift[c]), act}; }
  template <class... Cut> COORDATT_MEMBER Of<false> channels(int64_t c, Cut... cut) const {
    return {load(scale + c, cut...), load(shift + c, cut...), act};
  }
#if defined(COORDATT_SIMD_AVX512)
  COORDATT_MEMBER Of<false> channels_of(int64_t c, vint planes) const {
    auto of = [&](const A* p) { return (vfloat)_mm512_permutexvar_ps((__m512i)planes, (__m512)load(p + c)); };
    return {of(scale), of(shift), act};
  }
#endif
};

}  // namespace
}  // namespace COORDATT_LEVEL
}  // namespace coordatt
