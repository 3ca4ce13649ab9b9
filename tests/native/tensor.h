// What a call is given and writes: maps in their strides, and vectors.
#pragma once

#include "call.h"
#include "memory.h"

namespace native {

using coordatt::Map;
using coordatt::Param;

// A full-size tensor in its strides. An output must leave all between its elements alone.
class Tensor {
 public:
  Tensor(const Case& c, bool is_input, int64_t salt) : c_(c), s_(c.shape), spread_(c.spread) {
    const int64_t least = c.nhwc ? s_.c : s_.h * s_.w, steps = c.nhwc ? s_.h * s_.w : s_.c;
    if (spread_ == Spread::broadcast && !is_input) spread_ = Spread::gaps;
    step_ = spread_ == Spread::dense || spread_ == Spread::broadcast ? least : least + salt;
    if (spread_ == Spread::far) step_ = std::max(step_, (int64_t)(1 << 21) / bytes_of(c.dtype) / steps + salt);
    image_ = step_ * steps + (spread_ == Spread::dense ? 0 : salt);
    if (spread_ == Spread::broadcast && salt % 2) image_ = 0;
    else if (spread_ == Spread::broadcast) step_ = 0, image_ = least;
    extent_ = s_.n ? (s_.n - 1) * image_ + (steps - 1) * step_ + least : 0;
    memory_ = std::make_unique<Memory>(extent_, c.dtype, salt % 3 != 0, salt % 2 ? 0 : salt);
  }
  Map map() const { return {memory_->data(), image_, step_}; }
  int64_t at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t pixel = h * s_.w + w;
    return n * image_ + (c_.nhwc ? pixel * step_ + c : c * step_ + pixel);
  }
  // f(place here, place in [N, C, H, W])
  template <class F> void each(const F& f) const {
    int64_t i = 0;
    for (int64_t n = 0; n < s_.n; ++n)
      for (int64_t c = 0; c < s_.c; ++c)
        for (int64_t h = 0; h < s_.h; ++h)
          for (int64_t w = 0; w < s_.w; ++w) f(at(n, c, h, w), i++);
  }
  void set(const Numbers& values) {
    each([&](int64_t here, int64_t i) { memory_->set(here, values[(size_t)i]); });
  }
  Numbers values() const {
    Numbers v((size_t)(s_.n * s_.c * s_.h * s_.w));
    each([&](int64_t here, int64_t i) { v[(size_t)i] = (*memory_)[here]; });
    return v;
  }
  bool intact() const {
    if (!memory_->intact()) return false;
    if (spread_ == Spread::dense) return true;
    std::vector<bool> used((size_t)extent_);
    each([&](int64_t here, int64_t) { used[(size_t)here] = true; });
    for (int64_t i = 0; i < extent_; ++i)
      if (!used[(size_t)i] && !memory_->untouched(i)) return false;
    return true;
  }

 private:
  const Case& c_;
  const Shape& s_;
  Spread spread_;
  int64_t step_, image_, extent_;
  std::unique_ptr<Memory> memory_;
};

struct Values {  // a parameter, its gradient or what is kept, in its type
  Memory memory;
  Values(int64_t count, DType t, bool at_end) : memory(count, t, at_end) {}
  Values(const Numbers& v, DType t, bool at_end) : memory((int64_t)v.size(), t, at_end) {
    for (size_t i = 0; i < v.size(); ++i) memory.set((int64_t)i, v[i]);
  }
  Param param() const { return {memory.count() ? memory.data() : nullptr, memory.type()}; }
  void* data() const { return memory.data(); }
};

}  // namespace native
