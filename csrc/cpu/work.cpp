#include "work.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <new>

#include "environment.h"

namespace coordatt {
namespace {

constexpr int64_t kept_limit = 16 << 20;  // a larger buffer goes back to the system after the call

struct Buffer {
  char* data = nullptr;
  int64_t size = 0, used = 0, wanted = 0;
  ~Buffer() { free(data); }
};
thread_local Buffer buffer;

void* aligned(int64_t size) {
  void* p = aligned_alloc(64, (size_t)Scratch::round(size));
  if (!p) throw std::bad_alloc();
  return p;
}

}  // namespace

Scratch::Scratch(int64_t bytes) : size_(round(bytes)) {
  if (buffer.wanted < buffer.used + size_) buffer.wanted = buffer.used + size_;
  if (buffer.used == 0 && buffer.size < buffer.wanted && size_ <= kept_limit) {
    free(buffer.data);
    buffer.data = nullptr;
    buffer.size = 0;
    int64_t size = buffer.wanted < kept_limit ? buffer.wanted : kept_limit;
    buffer.data = (char*)aligned(size);
    buffer.size = size;
  }
  kept_ = buffer.used + size_ <= buffer.size;
  base_ = kept_ ? buffer.data + buffer.used : (char*)aligned(size_);
  if (kept_) buffer.used += size_;
  at_ = base_;
  if (environment().poison) memset(base_, 0xff, (size_t)size_);  // all ones is a NaN in every type used
}

Scratch::~Scratch() {
  if (kept_) buffer.used -= size_;
  else free(base_);
}

Pieces::Pieces(const Call& call, int threads, Along along)
    : along_(along), images_(call.shape.n), groups_(1), length_(along == rows ? call.shape.h : call.shape.c),
      other_(along == rows ? call.shape.c : call.shape.h) {
  width_ = length_;
  int64_t n = images_;
  if (threads <= 1 || n % threads == 0 || n >= 8 * threads || n == 0) return;
  // Vectors run along channels in nhwc, along rows in nchw, where any cut will do.
  int64_t least = along == rows ? 1 : call.nhwc ? max_lanes : 4;
  // A thread that walks some channels of each pixel reads them in shorter runs the more pieces there are.
  int64_t want = call.nhwc && along == channels ? threads : 2 * threads, most = (length_ + least - 1) / least;
  groups_ = want < most ? want : most;
  width_ = (length_ + groups_ - 1) / groups_;
  width_ = (width_ + least - 1) / least * least;
  groups_ = (length_ + width_ - 1) / width_;
}

bool whole_pixels_pay(const Call& call) {
  return call.nhwc && call.shape.c * call.shape.h * call.shape.w * dtype_bytes(call.dtype) > 256 << 10;
}

double work_ns(const Call& call) {
  const Shape& s = call.shape;
  return 0.2 * (double)(s.n * s.c * s.h * s.w) + (double)(s.rows() * s.c) * (1.5 + 0.1 * (double)s.m);
}

Threads worth(const Threads& threads, double nanoseconds) {
  Threads t = threads;
  if (nanoseconds < 10000) t.count = 1;
  return t;
}

AxisRows rows_of(const Piece& p, void* base, const Shape& s, int64_t width, int64_t bytes) {
  AxisRows r;
  r.h = at(base, (p.image * s.h + p.h0) * width, bytes);
  r.w = at(base, (s.n * s.h + p.image * s.w) * width, bytes);
  r.ld = width;
  return r;
}

void* start_of(const Piece& p, const Call& call, const Map& m) {
  return at(m.data, p.image * m.image + p.h0 * call.shape.w * m.step, dtype_bytes(call.dtype));
}

PlaneArgs plane_args(const Call& call, const Piece& p, Scratch& scratch) {
  PlaneArgs a{};
  a.h = p.h1 - p.h0;
  a.full_h = call.shape.h;
  a.w = call.shape.w;
  a.c0 = p.c0;
  a.c1 = p.c1;
  a.skip = call.skip;
  a.scratch = scratch.bytes(0);
  return a;
}

void load_param(const Kernels& k, DType acc, const Param& p, int64_t count, void* to) {
  if (p.dtype == acc) memcpy(to, p.data, (size_t)(count * dtype_bytes(acc)));
  else k.map[(int)p.dtype].to_acc(p.data, to, count);
}

namespace {

DType acc_of(const Call& call) { return call.dtype == DType::f64 ? DType::f64 : DType::f32; }

template <class A>
void fill(A* to, int64_t count, A value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <class A>
void fold(const Call& call, const Kernels& k, const A* var, A* scale) {
  int64_t m = call.shape.m;
  if (call.params.bn_weight) load_param(k, acc_of(call), call.params.bn_weight, m, scale);
  else fill(scale, m, A(1));
  for (int64_t i = 0; var && i < m; ++i) scale[i] /= (A)sqrt(var[i] + (A)call.params.eps);
}

}  // namespace

void fold_scale(const Call& call, const Kernels& k, const void* var, void* scale) {
  if (call.dtype == DType::f64) fold(call, k, (const double*)var, (double*)scale);
  else fold(call, k, (const float*)var, (float*)scale);
}

int64_t Middle::scratch_bytes(const Call& call) {
  int64_t c = call.shape.c, m = call.shape.m;
  return (5 * m * c + 2 * c + 4 * m) * acc_bytes(call.dtype) + 11 * 64;
}

Middle::Middle(const Call& call, const Kernels& k, Scratch& scratch, const void* known_mean, const void* var,
               bool transpose)
    : mean(known_mean), expand_h(nullptr), expand_w(nullptr) {
  const Params& p = call.params;
  int64_t c = call.shape.c, m = call.shape.m, bytes = acc_bytes(call.dtype);
  DType acc = acc_of(call);
  const MixKernels& mix = mix_of(k, call.dtype);
  auto dense = [&](const Param& param, int64_t count) -> void* {
    if (!param || param.dtype == acc) return param.data;
    void* to = scratch.bytes(count * bytes);
    load_param(k, acc, param, count, to);
    return to;
  };
  conv1_weight = dense(p.conv1_weight, m * c);
  conv1_bias = dense(p.conv1_bias, m);
  bias_h = dense(p.conv_h_bias, c);
  bias_w = dense(p.conv_w_bias, c);
  conv_h = dense(p.conv_h_weight, m * c);
  conv_w = dense(p.conv_w_weight, m * c);
  if (transpose) {
    expand_h = scratch.bytes(m * c * bytes);
    expand_w = scratch.bytes(m * c * bytes);
    mix.transpose(conv_h, m, c, m, expand_h, c);
    mix.transpose(conv_w, m, c, m, expand_w, c);
  }
  scale = scratch.bytes(m * bytes);
  shift = scratch.bytes(m * bytes);
  fold_scale(call, k, var, scale);
  void* zeros = scratch.bytes(m * bytes);
  memset(zeros, 0, (size_t)(m * bytes));
  if (!mean) mean = zeros;
  if (p.bn_bias) load_param(k, acc, p.bn_bias, m, shift);
  else memset(shift, 0, (size_t)(m * bytes));
}

}  // namespace coordatt
