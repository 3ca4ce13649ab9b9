// What all backends share: the arguments of one call, free of torch. Strides are in elements.
#pragma once

#include <stdint.h>

namespace coordatt {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
// What is computed in, and sizes in bytes.
inline DType acc_of(DType t) { return t == DType::f64 ? DType::f64 : DType::f32; }
inline int bytes_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }
inline int acc_bytes_of(DType t) { return bytes_of(acc_of(t)); }

enum class Activation : int { hard_swish = 0, silu = 1, relu = 2, relu6 = 3 };
constexpr int activations = (int)Activation::relu6 + 1;  // the last one's
constexpr int no_activation = -1;                         // before the block, where there may be none
// Whether it does more than cut off what is below or above.
constexpr bool is_curved(Activation a) {
  switch (a) {
    case Activation::hard_swish:
    case Activation::silu: return true;
    case Activation::relu:
    case Activation::relu6: return false;
  }
  return true;
}
enum class Norm : int { none = 0, given = 1, batch = 2 };
// The gradients that attend_backward is asked for: a bit for each of its results, in their order.
enum Need : int64_t {
  need_x = 1 << 0,
  need_conv1_weight = 1 << 1,
  need_conv1_bias = 1 << 2,
  need_bn_weight = 1 << 3,
  need_bn_bias = 1 << 4,
  need_conv_h_weight = 1 << 5,
  need_conv_h_bias = 1 << 6,
  need_conv_w_weight = 1 << 7,
  need_conv_w_bias = 1 << 8,
  need_before_weight = 1 << 9,
  need_before_bias = 1 << 10,
};

// The feature map's sizes; M is the width of the squeezed middle.
struct Shape {
  int64_t n, c, h, w, m;
  int64_t length() const { return h + w; }
  int64_t rows() const { return n * (h + w); }
};

// A full-size tensor. nchw: every plane is dense (w stride 1, h stride W). nhwc: channels are dense and a row's
// pixels evenly spaced (h stride W * pixel).
struct Map {
  void* data = nullptr;
  int64_t image = 0;  // elements between images
  int64_t step = 0;   // nchw: elements between channels; nhwc: between pixels
};

// A parameter, or its gradient: dense, in its own dtype; data is null where it is absent.
struct Param {
  void* data = nullptr;
  DType dtype = DType::f32;
  explicit constexpr operator bool() const { return data != nullptr; }
};

struct Params {
  Param conv1_weight, conv1_bias;      // [M, C], [M]
  Param bn_weight, bn_bias;            // [M]
  Param mean, var;                     // [M], Norm::given
  Param conv_h_weight, conv_h_bias;    // [C, M], [C]
  Param conv_w_weight, conv_w_bias;    // [C, M], [C]
  double eps = 0;
};

// The normalisation and activation that stand before the block. The map that is pooled and gated is then
// act(scale x + shift), formed as x is loaded.
struct Before {
  Norm norm = Norm::none;          // none: nothing stands there
  int activation = no_activation;  // or an Activation
  Param weight, bias;              // [C]
  Param mean, var;                 // [C], Norm::given
  double eps = 0;
};

// What every call says.
struct Call {
  Shape shape;
  DType dtype = DType::f32;  // of the full-size tensors
  bool nhwc = false;
  Norm norm = Norm::given;
  Activation activation = Activation::hard_swish;
  bool skip = false;
  Params params;
  Before before;
};

// Kept between forward and backward, in the accumulate type (float64 for float64, else float32).
// Rows: R = N * (H + W); row n*H + h first, then N*H + n*W + w.
struct Saved {
  void* pooled = nullptr;    // [R, C] row and column means
  void* squeezed = nullptr;  // [R, M] conv1's output
  void* gates = nullptr;     // [R, C] after the sigmoid
  void* mean = nullptr;      // [M]
  void* var = nullptr;       // [M] biased
  void* before_mean = nullptr;  // [C] of what stands before the block, where something does
  void* before_var = nullptr;   // [C] biased
};

// Running statistics that a training forward moves; all null where none do. Steps in elements.
struct RunningStatistics {
  Param mean, var;  // [M]
  int64_t mean_step = 0, var_step = 0;
  int64_t* tracked = nullptr;
  double momentum = 0;
  bool cumulative = false;  // by 1 / (batches seen) in place of momentum
};

struct ForwardArgs : Call {
  explicit ForwardArgs(const Call& call) : Call(call) {}
  Map x, out;
  Saved saved;  // all null in inference
};

struct Gradients {
  Map dx;  // null data: not wanted; the same holds for each parameter
  Param conv1_weight, conv1_bias, bn_weight, bn_bias;
  Param conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias;
  Param before_weight, before_bias;
};

struct BackwardArgs : Call {
  explicit BackwardArgs(const Call& call) : Call(call) {}
  Map grad, x;
  Saved saved;
  Gradients out;
};

// What the middle's backward pass keeps, in the accumulate type.
struct MixGradients {
  void* dlogits = nullptr;  // [R, C]
  void* du = nullptr;       // [R, M] before the activation; then dz, conv1's output
  void* y = nullptr;        // [R, M] after the activation
};

// The pool pass alone and the gate pass alone, for modules whose middle runs elsewhere.
struct PoolArgs : Call {
  explicit PoolArgs(const Call& call) : Call(call) {}
  Map x;                   // forward in, or dx out
  void* pooled = nullptr;  // [N, H+W, C] accumulate type: means, or their gradients
};
struct GateArgs : Call {
  explicit GateArgs(const Call& call) : Call(call) {}
  Map x, out;               // backward: out is dx
  Map grad;                 // backward only
  void* gates = nullptr;    // [R, C] accumulate type, after the sigmoid
  void* dlogits = nullptr;  // backward only: [R, C], gradient before the sigmoid
};

// How a backend runs tasks: body(context, begin, end) over [0, count) in contiguous chunks, one per thread.
struct Threads {
  int count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);
};

}  // namespace coordatt
