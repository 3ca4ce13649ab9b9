#include "middle.h"

#include <math.h>
#include <string.h>

namespace coordatt {

void load_param(const Kernels& k, DType acc, const Param& p, int64_t count, void* to) {
  if (p.dtype == acc) memcpy(to, p.data, (size_t)(count * bytes_of(acc)));
  else k.map[(int)p.dtype].to_acc(p.data, to, count);
}

namespace {

template <class A>
void fill(A* to, int64_t count, A value) {
  for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <class A>
void fold(const Call& call, const Kernels& k, const A* var, A* scale) {
  int64_t m = call.shape.m;
  if (call.params.bn_weight) load_param(k, acc_of(call.dtype), call.params.bn_weight, m, scale);
  else fill(scale, m, A(1));
  for (int64_t i = 0; var && i < m; ++i) scale[i] /= (A)sqrt(var[i] + (A)call.params.eps);
}

}  // namespace

void fold_scale(const Call& call, const Kernels& k, const void* var, void* scale) {
  if (call.dtype == DType::f64) fold(call, k, (const double*)var, (double*)scale);
  else fold(call, k, (const float*)var, (float*)scale);
}

namespace {

// Folded in float64, as the products may cancel.
template <class A>
void fold_before(const Call& call, const Kernels& k, const A* mean, const A* var, A* scale, A* shift) {
  const Before& before = call.before;
  const int64_t c = call.shape.c;
  if (before.weight) load_param(k, acc_of(call.dtype), before.weight, c, scale);
  else fill(scale, c, A(1));
  if (before.bias) load_param(k, acc_of(call.dtype), before.bias, c, shift);
  else fill(shift, c, A(0));
  for (int64_t i = 0; i < c; ++i) {
    const double by = (double)scale[i] / sqrt((double)var[i] + before.eps);
    scale[i] = (A)by;
    shift[i] = (A)((double)shift[i] - (double)mean[i] * by);
  }
  for (int64_t i = c; i < padded(c); ++i) scale[i] = shift[i] = 0;
}

Read read_of(int activation) {
  return activation != no_activation && is_curved((Activation)activation) ? curved : bounded;
}

}  // namespace

int64_t Ahead::scratch_bytes(const Call& call) { return 2 * Scratch::round(padded(call.shape.c) * acc_bytes_of(call.dtype)); }

Ahead::Ahead(const Call& call, const Kernels& k, Scratch& scratch, const void* mean, const void* var)
    : read(read_of(call.before.activation)) {
  const int64_t bytes = padded(call.shape.c) * acc_bytes_of(call.dtype);
  void *scale = scratch.bytes(bytes), *shift = scratch.bytes(bytes);
  if (call.dtype == DType::f64) fold_before(call, k, (const double*)mean, (const double*)var, (double*)scale, (double*)shift);
  else fold_before(call, k, (const float*)mean, (const float*)var, (float*)scale, (float*)shift);
  args.scale = scale;
  args.shift = shift;
  args.activation = call.before.activation;
  args.mean = mean;
}

int64_t Middle::scratch_bytes(const Call& call) {
  int64_t c = call.shape.c, m = call.shape.m;
  return (5 * m * c + 2 * c + 4 * m) * acc_bytes_of(call.dtype) + 11 * 64;
}

Middle::Middle(const Call& call, const Kernels& k, Scratch& scratch, const void* known_mean, const void* var,
               bool transpose)
    : mean(known_mean), expand_h(nullptr), expand_w(nullptr) {
  const Params& p = call.params;
  int64_t c = call.shape.c, m = call.shape.m, bytes = acc_bytes_of(call.dtype);
  DType acc = acc_of(call.dtype);
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
