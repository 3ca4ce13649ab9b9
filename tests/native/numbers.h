// Numbers of every stored type as double, rounded to nearest even on their way back, and random ones that are the same
// on every machine.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <vector>

#include "coordatt.h"

namespace native {

using coordatt::DType;
using Number = double;
using Numbers = std::vector<Number>;

constexpr DType dtypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

inline const char* name_of(DType t) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[(int)t];
}

// Mantissa bits, the leading one included, and the exponent of the smallest normal number.
inline int digits_of(DType t) { return t == DType::f64 ? 53 : t == DType::f32 ? 24 : t == DType::bf16 ? 8 : 11; }
inline int lowest_of(DType t) { return t == DType::f64 ? -1022 : t == DType::f16 ? -14 : -126; }
inline Number eps_of(DType t) { return ldexp(1, 1 - digits_of(t)); }

// Rounded to the type; beyond its largest number infinite.
inline Number rounded(Number v, DType t) {
  if (t == DType::f64) return v;
  if (t == DType::f32) return (float)v;
  if (!isfinite(v) || v == 0) return v;
  int exponent;
  frexp(v, &exponent);
  int last = (exponent - 1 < lowest_of(t) ? lowest_of(t) : exponent - 1) - digits_of(t) + 1;
  Number r = ldexp(rint(ldexp(v, -last)), last);
  Number largest = t == DType::f16 ? 65504 : ldexp(255, 120);
  return fabs(r) > largest ? copysign(INFINITY, v) : r;
}

inline Number half_value(uint16_t bits, DType t) {
  int fraction_bits = digits_of(t) - 1, fraction = bits & ((1 << fraction_bits) - 1);
  int exponent = (bits & 0x7fff) >> fraction_bits, top = 0x7fff >> fraction_bits;
  Number v = exponent == top ? (fraction ? (Number)NAN : (Number)INFINITY)
             : exponent == 0 ? ldexp(fraction, lowest_of(t) - fraction_bits)
                             : ldexp(fraction + (1 << fraction_bits), lowest_of(t) + exponent - 1 - fraction_bits);
  return bits & 0x8000 ? -v : v;
}

// Of a number that the type holds.
inline uint16_t half_bits(Number v, DType t) {
  int fraction_bits = digits_of(t) - 1, top = 0x7fff >> fraction_bits;
  uint16_t sign = signbit(v) ? 0x8000 : 0;
  if (isnan(v)) return 0x7fff;
  if (isinf(v)) return (uint16_t)(sign | top << fraction_bits);
  if (v == 0) return sign;
  int exponent;
  frexp(v, &exponent);
  exponent = exponent - 1 < lowest_of(t) ? lowest_of(t) : exponent - 1;
  int units = (int)ldexp(fabs(v), fraction_bits - exponent);  // subnormal: without the leading one
  return (uint16_t)(sign | (units + ((exponent - lowest_of(t)) << fraction_bits)));
}

inline Number get(const void* data, DType t, int64_t i) {
  const char* p = (const char*)data + i * bytes_of(t);
  if (t == DType::f64) { double v; memcpy(&v, p, 8); return v; }
  if (t == DType::f32) { float v; memcpy(&v, p, 4); return v; }
  uint16_t bits;
  memcpy(&bits, p, 2);
  return half_value(bits, t);
}

inline void put(void* data, DType t, int64_t i, Number v) {
  char* p = (char*)data + i * bytes_of(t);
  if (t == DType::f64) { memcpy(p, &v, 8); return; }
  if (t == DType::f32) { float f = (float)v; memcpy(p, &f, 4); return; }
  uint16_t bits = half_bits(rounded(v, t), t);
  memcpy(p, &bits, 2);
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return (int64_t)(bits() % (uint64_t)n); }
  double uniform() { return (double)(bits() >> 11) * 0x1p-53 * 2 - 1; }  // [-1, 1)
  double normal() { return uniform() + uniform() + uniform(); }          // of variance 1, within 3

 private:
  uint64_t state_;
};

}  // namespace native
