// What the bindings of every backend share, on the libtorch stable ABI: checks of what the kernels take for granted,
// tensors turned into the structs of coordatt.h, the fused operators, and all schemas. Only this file, library.cpp and
// the backends' bindings.cpp see torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "coordatt.h"

namespace coordatt {
namespace bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "coordatt_fast: ", __VA_ARGS__)

// What the operators are registered under: coordatt_fast, or what hub/assemble.py wrote into a copy of the library, so that
// one process can hold several. In library.cpp.
const char* operators_namespace();

// Registers operators under that name. STABLE_TORCH_LIBRARY and its kin take a name that is fixed when they are compiled.
class Registration {
 public:
  enum Kind { definitions, more_definitions, implementations };

  Registration(Kind kind, const char* key, void (*fill)(Registration&), const char* file, uint32_t line) {
    const char* name = operators_namespace();
    TORCH_ERROR_CODE_CHECK(kind == implementations    ? aoti_torch_library_init_impl(name, key, file, line, &handle_)
                           : kind == more_definitions ? aoti_torch_library_init_fragment(name, file, line, &handle_)
                                                      : aoti_torch_library_init_def(name, file, line, &handle_));
    fill(*this);
  }
  Registration(const Registration&) = delete;
  ~Registration() { aoti_torch_delete_library_object(handle_); }

  void def(const char* schema) { TORCH_ERROR_CODE_CHECK(aoti_torch_library_def(handle_, schema)); }
  void impl(const char* name, void (*boxed)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(handle_, name, boxed, TORCH_ABI_VERSION));
  }

 private:
  TorchLibraryHandle handle_;
};

// Followed by a block that calls m.def or m.impl; once a file for each kind.
#define COORDATT_REGISTER(kind, key, m)                                                                              \
  static void register_##kind(Registration&);                                                                        \
  static const Registration kind##_of_this_file(Registration::kind, key, &register_##kind, __FILE__, __LINE__);      \
  static void register_##kind(Registration& m)

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return DType::f32;
}

inline ScalarType acc_of(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// On the device of like.
inline Tensor empty_strided(const Tensor& like, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                            ScalarType dtype) {
  int32_t kind, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &kind));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.begin(), strides.begin(), (int32_t)dtype, kind,
                                                  index, &handle));
  return Tensor(handle);
}

inline Tensor empty1(const Tensor& like, int64_t n, ScalarType dtype) { return empty_strided(like, {n}, {1}, dtype); }
inline Tensor empty2(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  return empty_strided(like, {rows, columns}, {columns, 1}, dtype);
}

// channels_last, by the strides: channels dense. A map of one channel counts as nchw.
inline bool is_nhwc(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1; }

// The strides of a fresh map. Where they say the same of memory, sizes of one are given PyTorch's: one pixel is nchw.
struct MapStrides {
  int64_t of[4];
  MapStrides(const Tensor& like, bool nhwc) {
    int64_t c = like.size(1), h = like.size(2), w = like.size(3);
    int64_t dense[4] = {c * h * w, h * w, w, 1}, last[4] = {h * w * c, 1, w * c, c};
    for (int d = 0; d < 4; ++d) of[d] = nhwc && h * w != 1 ? last[d] : dense[d];
  }
};

// Whether what the gate makes of x has channels_last strides. Of one channel both are dense, and PyTorch's product keeps
// x's, but its sum with an x that counts as contiguous does not.
inline bool makes_nhwc(const Tensor& x, bool skip) {
  if (x.size(1) != 1) return is_nhwc(x);
  return x.stride(1) == 1 && x.size(3) > 1 && !(x.is_contiguous() && (skip || x.size(2) == 1));
}

// Whether kernels can walk it as it is: dense planes (nchw), or dense channels of evenly spaced pixels (nhwc).
inline bool has_dense_planes(const Tensor& t, bool nhwc) {
  int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (!nhwc) return (w == 1 || t.stride(3) == 1) && (h == 1 || t.stride(2) == w);
  int64_t step = w > 1 ? t.stride(3) : t.stride(2);
  return (c == 1 || t.stride(1) == 1) && (w == 1 || h == 1 || t.stride(2) == w * step);
}

// Where its elements are. A tensor whose storage was resized to nothing has elements and no memory.
inline void* data_of(const Tensor& t, const char* name) {
  void* data = t.mutable_data_ptr();
  CHECK(data || t.numel() == 0, name, " has ", t.numel(), " elements, but its storage is empty");
  return data;
}

inline void check_map(const Tensor& t, const char* name) {
  CHECK(t.dim() == 4, name, " must be [N, C, H, W], got ", t.dim(), " dimensions");
  dtype_of(t, name);
  data_of(t, name);
}

inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  int32_t kind, wanted;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &kind));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &wanted));
  CHECK(kind == wanted && t.get_device_index() == x.get_device_index(), name, " must be on x's device");
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t size : t.sizes()) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_map(t, name);
  check_device(t, x, name);
  CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
  for (int64_t d = 0; d < 4; ++d)
    CHECK(t.size(d) == x.size(d), name, " must have x's shape: size ", t.size(d), " at dimension ", d, ", x has ", x.size(d));
}

inline Map map_of(const Tensor& t, bool nhwc) {
  Map m;
  m.data = t.mutable_data_ptr();
  m.image = t.stride(0);
  m.step = !nhwc ? t.stride(1) : t.size(3) > 1 ? t.stride(3) : t.size(2) > 1 ? t.stride(2) : t.size(1);
  return m;
}

// Parameters, dense and kept alive for the call. A null one stays null.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}

  // The weight of a 1x1 convolution: [rows, columns, 1, 1].
  Param matrix(const Tensor& t, int64_t rows, int64_t columns, const char* name) {
    auto size = t.sizes();
    CHECK(size.size() == 4 && size[0] == rows && size[1] == columns && size[2] == 1 && size[3] == 1, name, " has shape ",
          shape_of(t), ", expected [", rows, ", ", columns, ", 1, 1]");
    return take(t, name);
  }

  Param vector(const MaybeTensor& t, int64_t count, const char* name) {
    if (!t) return {};
    auto size = t->sizes();
    CHECK(size.size() == 1 && size[0] == count, name, " has shape ", shape_of(*t), ", expected [", count, "]");
    return take(*t, name);
  }

  // So many numbers of any shape, as PyTorch takes a normalisation's weight and bias.
  Param numbers(const MaybeTensor& t, int64_t count, const char* name) {
    if (!t) return {};
    CHECK(t->numel() == count, name, " has shape ", shape_of(*t), ", expected [", count, "]");
    return take(*t, name);
  }

 private:
  Param take(const Tensor& t, const char* name) {
    Param p;
    p.dtype = dtype_of(t, name);
    check_device(t, x_, name);
    CHECK(t.scalar_type() == x_.scalar_type() || t.scalar_type() == acc_of(x_), name,
          " must have x's dtype, or float32 beside half-precision x");
    p.data = data_of(t, name);
    if (!t.is_contiguous()) {
      CHECK(copies_ < 10, "too many non-contiguous parameters");
      kept_[copies_] = torch::stable::contiguous(t);
      p.data = kept_[copies_++]->mutable_data_ptr();
    }
    return p;
  }

  const Tensor& x_;
  MaybeTensor kept_[10];
  int copies_ = 0;
};

inline Call call_of(const Tensor& x, int64_t norm, int64_t activation, bool skip) {
  check_map(x, "x");
  CHECK(norm >= (int64_t)Norm::none && norm <= (int64_t)Norm::batch, "norm must be 0, 1 or 2, got ", norm);
  CHECK(activation >= 0 && activation < activations, "activation must be 0 to ", activations - 1, ", got ", activation);
  Call call;
  call.shape = {x.size(0), x.size(1), x.size(2), x.size(3), 0};
  call.dtype = dtype_of(x, "x");
  call.nhwc = is_nhwc(x);
  call.norm = (Norm)norm;
  call.activation = (Activation)activation;
  call.skip = skip;
  return call;
}

// What the gate alone is given for its rows and columns, in any dtype and strides; float64 beside float64.
inline void check_logits(const Shape& s, const Tensor& x, const Tensor& s_h, const Tensor& s_w) {
  check_device(s_h, x, "s_h");
  check_device(s_w, x, "s_w");
  CHECK(s_h.dim() == 4 && s_h.size(0) == s.n && s_h.size(1) == s.c && s_h.size(2) == s.h && s_h.size(3) == 1,
        "s_h must be [N, C, H, 1]");
  CHECK(s_w.dim() == 4 && s_w.size(0) == s.n && s_w.size(1) == s.c && s_w.size(2) == 1 && s_w.size(3) == s.w,
        "s_w must be [N, C, 1, W]");
  bool wide = dtype_of(x, "x") == DType::f64;
  CHECK((dtype_of(s_h, "s_h") == DType::f64) == wide && (dtype_of(s_w, "s_w") == DType::f64) == wide,
        "logits must be float64 exactly where x is");
}

struct ForwardTensors {
  const Tensor& conv1_weight; const MaybeTensor& conv1_bias;
  const MaybeTensor& bn_weight; const MaybeTensor& bn_bias;
  const MaybeTensor& bn_mean; const MaybeTensor& bn_var;
  double eps;
  const Tensor& conv_h_weight; const MaybeTensor& conv_h_bias;
  const Tensor& conv_w_weight; const MaybeTensor& conv_w_bias;
};

inline void set_params(Call& call, const ForwardTensors& t, Parameters& params) {
  CHECK(t.conv1_weight.dim() == 4, "conv1_weight must be [M, C, 1, 1]");
  int64_t m = call.shape.m = t.conv1_weight.size(0), c = call.shape.c;
  CHECK(m >= 1, "conv1_weight must have at least one output channel");
  Params& p = call.params;
  p.conv1_weight = params.matrix(t.conv1_weight, m, c, "conv1_weight");
  p.conv1_bias = params.vector(t.conv1_bias, m, "conv1_bias");
  p.bn_weight = params.numbers(t.bn_weight, m, "bn_weight");
  p.bn_bias = params.numbers(t.bn_bias, m, "bn_bias");
  if (call.norm == Norm::given) {
    CHECK(t.bn_mean.has_value() && t.bn_var.has_value(), "norm 1 needs bn_mean and bn_var");
    p.mean = params.vector(t.bn_mean, m, "bn_mean");
    p.var = params.vector(t.bn_var, m, "bn_var");
  }
  CHECK(!(t.eps < 0 && call.norm != Norm::none) && !(t.eps == 0 && call.norm == Norm::batch), "eps is ", t.eps,
        ", expected a positive number, or zero beside given statistics");
  p.conv_h_weight = params.matrix(t.conv_h_weight, c, m, "conv_h_weight");
  p.conv_h_bias = params.vector(t.conv_h_bias, c, "conv_h_bias");
  p.conv_w_weight = params.matrix(t.conv_w_weight, c, m, "conv_w_weight");
  p.conv_w_bias = params.vector(t.conv_w_bias, c, "conv_w_bias");
  p.eps = t.eps;
}

// What a training forward moves: in narrow (x's dtype, where it is known) or in mean's, the accumulate dtype.
inline RunningStatistics running_of(const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& tracked,
                                    std::optional<double> momentum, const Tensor& mean, std::optional<DType> narrow) {
  RunningStatistics r;
  if (tracked) {
    check_device(*tracked, mean, "num_batches_tracked");
    CHECK(tracked->scalar_type() == ScalarType::Long && tracked->numel() == 1, "num_batches_tracked must be one int64 number");
    r.tracked = (int64_t*)data_of(*tracked, "num_batches_tracked");
  }
  r.momentum = momentum ? *momentum : 0;
  r.cumulative = !momentum && tracked;
  auto take = [&](const MaybeTensor& t, Param& p, int64_t& step, const char* name) {
    if (!t) return;
    check_device(*t, mean, name);
    CHECK(t->dim() == 1 && t->numel() == mean.numel(), name, " has shape ", shape_of(*t), ", expected [", mean.numel(), "]");
    p = {data_of(*t, name), dtype_of(*t, name)};
    step = t->stride(0);
    bool is_wide = (mean.scalar_type() == ScalarType::Double) == (p.dtype == DType::f64);
    bool is_half = p.dtype == DType::bf16 || p.dtype == DType::f16;
    CHECK(is_wide && !(is_half && narrow && *narrow != p.dtype), name,
          " must have x's dtype, or float32 beside half-precision x");
    if (is_half) narrow = p.dtype;  // the other one's too
  };
  take(running_mean, r.mean, r.mean_step, "running_mean");
  take(running_var, r.var, r.var_step, "running_var");
  return r;
}

#define FORWARD_PARAMETERS                                                                                    \
  const Tensor &conv1_weight, const MaybeTensor &conv1_bias, const MaybeTensor &bn_weight,                    \
      const MaybeTensor &bn_bias, const MaybeTensor &bn_mean, const MaybeTensor &bn_var, double eps,          \
      const Tensor &conv_h_weight, const MaybeTensor &conv_h_bias, const Tensor &conv_w_weight,               \
      const MaybeTensor &conv_w_bias
#define FORWARD_TENSORS                                                                                       \
  ForwardTensors {                                                                                            \
    conv1_weight, conv1_bias, bn_weight, bn_bias, bn_mean, bn_var, eps, conv_h_weight, conv_h_bias,           \
        conv_w_weight, conv_w_bias                                                                            \
  }

using Trained = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using GradientTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The bytes that a tensor's elements lie between.
struct Span {
  uintptr_t first = 0, end = 0;
  Span() = default;
  explicit Span(const Tensor& t) : first((uintptr_t)t.const_data_ptr()) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    end = first + (t.numel() ? (last + 1) * t.element_size() : 0);
  }
  bool meets(const Span& other) const { return first < other.end && other.first < end; }
};

// Element by element the same memory.
inline bool is_same(const Tensor& t, const Tensor& x) {
  bool same = t.const_data_ptr() == x.const_data_ptr();
  for (int64_t d = 0; d < x.dim(); ++d) same = same && (x.size(d) <= 1 || t.stride(d) == x.stride(d));
  return same;
}

// The gradients that bit i of needs asks for, as fresh tensors (empty ones for the others); args.out points into them.
struct MadeGradients {
  Tensor dx, conv1_weight, conv1_bias, bn_weight, bn_bias, conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias;

  MadeGradients(BackwardArgs& args, const Tensor& x, Tensor (*empty_map)(const Tensor&, bool), int64_t needs, const Tensor& w1,
                const MaybeTensor& bn, const Tensor& wh, const Tensor& ww)
      : dx(needs & need_x ? empty_map(x, args.nhwc) : empty1(x, 0, x.scalar_type())),
        conv1_weight(weight(needs & need_conv1_weight, args.shape.m, args.shape.c, w1, args.out.conv1_weight)),
        conv1_bias(vector(needs & need_conv1_bias, args.shape.m, w1, args.out.conv1_bias)),
        bn_weight(vector(needs & need_bn_weight, args.shape.m, bn ? *bn : w1, args.out.bn_weight)),
        bn_bias(vector(needs & need_bn_bias, args.shape.m, bn ? *bn : w1, args.out.bn_bias)),
        conv_h_weight(weight(needs & need_conv_h_weight, args.shape.c, args.shape.m, wh, args.out.conv_h_weight)),
        conv_h_bias(vector(needs & need_conv_h_bias, args.shape.c, wh, args.out.conv_h_bias)),
        conv_w_weight(weight(needs & need_conv_w_weight, args.shape.c, args.shape.m, ww, args.out.conv_w_weight)),
        conv_w_bias(vector(needs & need_conv_w_bias, args.shape.c, ww, args.out.conv_w_bias)) {
    if (needs & need_x) args.out.dx = map_of(dx, args.nhwc);
  }

  static Tensor vector(bool wanted, int64_t size, const Tensor& like, Param& to) {
    Tensor t = empty1(like, wanted ? size : 0, like.scalar_type());
    if (wanted) to = {t.mutable_data_ptr(), dtype_of(like, "parameter")};
    return t;
  }
  static Tensor weight(bool wanted, int64_t rows, int64_t columns, const Tensor& like, Param& to) {
    if (!wanted) return empty1(like, 0, like.scalar_type());
    Tensor t = empty_strided(like, {rows, columns, 1, 1}, {columns, 1, 1, 1}, like.scalar_type());
    to = {t.mutable_data_ptr(), dtype_of(like, "parameter")};
    return t;
  }
  void zero() {
    for (Tensor* t : {&dx, &conv1_weight, &conv1_bias, &bn_weight, &bn_bias, &conv_h_weight, &conv_h_bias, &conv_w_weight,
                      &conv_w_bias})
      torch::stable::zero_(*t);
  }
  GradientTensors all() const {
    return {dx, conv1_weight, conv1_bias, bn_weight, bn_bias, conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias};
  }
};

// What a forward pass saved, as the backward pass takes it.
inline void* saved_data(const Tensor& t, const Tensor& x, int64_t count, const char* name) {
  check_device(t, x, name);
  CHECK(t.scalar_type() == acc_of(x) && t.is_contiguous() && t.numel() == count, name, " is not what the forward pass saved");
  return data_of(t, name);
}

// The operators of the fused tier. Backend: is_native(map, nhwc): whether its kernels can walk it; empty_map(like, nhwc);
// forward(args, running, x), backward(args, x), update(running, call, mean, var, rows, on).
template <class Backend> struct Fused {
  static Tensor native(const Tensor& t, bool nhwc) {
    if (Backend::is_native(t, nhwc)) return t;
    Tensor copy = Backend::empty_map(t, nhwc);
    torch::stable::copy_(copy, t);
    return copy;
  }

  // Before: what stands before the block.
  static void infer(const Tensor& x, const ForwardTensors& tensors, int64_t activation, bool skip, const Before& before,
                    const MaybeTensor& given_out, MaybeTensor& made_out) {
    CHECK(tensors.bn_mean.has_value() == tensors.bn_var.has_value(), "bn_mean and bn_var go together");
    ForwardArgs args(call_of(x, (int64_t)(tensors.bn_mean ? Norm::given : Norm::none), activation, skip));
    args.before = before;
    Parameters params(x);
    set_params(args, tensors, params);
    Tensor in = native(x, args.nhwc);
    Tensor out = given_out ? *given_out : Backend::empty_map(x, makes_nhwc(x, skip));
    args.x = map_of(in, args.nhwc);
    args.out = map_of(out, args.nhwc);
    Backend::forward(args, RunningStatistics{}, x);
    if (!given_out) made_out = out;
  }

  static Tensor attend(const Tensor& x, FORWARD_PARAMETERS, int64_t activation, bool skip) {
    MaybeTensor out;
    infer(x, FORWARD_TENSORS, activation, skip, Before(), std::nullopt, out);
    return *out;
  }

  static void attend_out(const Tensor& x, FORWARD_PARAMETERS, int64_t activation, bool skip, const Tensor& result) {
    check_map(x, "x");
    check_like(result, x, "out");
    bool nhwc = is_nhwc(x);
    MaybeTensor made;
    bool writable = Backend::is_native(result, nhwc);
    for (int64_t d = 0; d < 4; ++d) writable = writable && (result.size(d) <= 1 || result.stride(d) > 0);
    // What is written while it is still read comes out wrong; x itself is read before it is written.
    const Span to(result);
    writable = writable && (is_same(result, x) || !to.meets(Span(x)));
    for (const Tensor* t : {&conv1_weight, &conv_h_weight, &conv_w_weight}) writable = writable && !to.meets(Span(*t));
    for (const MaybeTensor* t : {&conv1_bias, &bn_weight, &bn_bias, &bn_mean, &bn_var, &conv_h_bias, &conv_w_bias})
      writable = writable && !(*t && to.meets(Span(**t)));
    infer(x, FORWARD_TENSORS, activation, skip, Before(), writable ? MaybeTensor(result) : std::nullopt, made);
    if (!writable) {
      Tensor given = result;
      torch::stable::copy_(given, *made);
    }
  }

  static Trained attend_train(const Tensor& x, FORWARD_PARAMETERS, int64_t norm, int64_t activation, bool skip) {
    return attend_train_update(x, conv1_weight, conv1_bias, bn_weight, bn_bias, bn_mean, bn_var, eps, conv_h_weight, conv_h_bias,
                               conv_w_weight, conv_w_bias, norm, activation, skip, std::nullopt, std::nullopt, std::nullopt,
                               std::nullopt);
  }

  static Trained attend_train_update(const Tensor& x, FORWARD_PARAMETERS, int64_t norm, int64_t activation, bool skip,
                                     const MaybeTensor& running_mean, const MaybeTensor& running_var,
                                     const MaybeTensor& num_batches_tracked, std::optional<double> momentum) {
    ForwardArgs args(call_of(x, norm, activation, skip));
    return train(args, x, FORWARD_TENSORS, running_mean, running_var, num_batches_tracked, momentum);
  }

  // args: what call_of says, and what stands before the block, with places for its statistics.
  static Trained train(ForwardArgs& args, const Tensor& x, const ForwardTensors& tensors, const MaybeTensor& running_mean,
                       const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked, std::optional<double> momentum) {
    CHECK(args.norm == Norm::batch || !(running_mean || running_var || num_batches_tracked),
          "running statistics move under batch statistics (norm 2) only");
    Parameters params(x);
    set_params(args, tensors, params);
    const Shape& s = args.shape;
    ScalarType acc = acc_of(x);
    Tensor in = native(x, args.nhwc), out = Backend::empty_map(x, makes_nhwc(x, args.skip));
    Tensor pooled = empty2(x, s.rows(), s.c, acc), squeezed = empty2(x, s.rows(), s.m, acc);
    Tensor gates = empty2(x, s.rows(), s.c, acc), mean = empty1(x, s.m, acc), var = empty1(x, s.m, acc);
    RunningStatistics running = running_of(running_mean, running_var, num_batches_tracked, momentum, mean, args.dtype);
    if (args.norm == Norm::given && !x.numel()) {
      torch::stable::copy_(mean, *tensors.bn_mean);
      torch::stable::copy_(var, *tensors.bn_var);
    } else if (args.norm == Norm::none || !x.numel()) {
      torch::stable::fill_(mean, 0);
      torch::stable::fill_(var, 1);
    }
    args.x = map_of(in, args.nhwc);
    args.out = map_of(out, args.nhwc);
    Saved& to = args.saved;
    to.pooled = pooled.mutable_data_ptr();
    to.squeezed = squeezed.mutable_data_ptr();
    to.gates = gates.mutable_data_ptr();
    to.mean = mean.mutable_data_ptr();
    to.var = var.mutable_data_ptr();
    Backend::forward(args, running, x);
    return {out, pooled, squeezed, gates, mean, var};
  }

  static GradientTensors attend_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& squeezed,
                            const Tensor& gates, const Tensor& mean, const Tensor& var, const Tensor& conv1_weight,
                            const MaybeTensor& bn_weight, const MaybeTensor& bn_bias, double eps, const Tensor& conv_h_weight,
                            const Tensor& conv_w_weight, int64_t norm, int64_t activation, bool skip, int64_t needs) {
    BackwardArgs args(call_of(x, norm, activation, skip));
    return gradients(args, grad, x, pooled, squeezed, gates, mean, var, conv1_weight, bn_weight, bn_bias, eps, conv_h_weight,
                     conv_w_weight, needs);
  }

  // args: what call_of says, and what stands before the block, with its statistics and places for its gradients.
  static GradientTensors gradients(BackwardArgs& args, const Tensor& grad, const Tensor& x, const Tensor& pooled,
                                   const Tensor& squeezed, const Tensor& gates, const Tensor& mean, const Tensor& var,
                                   const Tensor& conv1_weight, const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
                                   double eps, const Tensor& conv_h_weight, const Tensor& conv_w_weight, int64_t needs) {
    check_like(grad, x, "grad");
    CHECK(conv1_weight.dim() == 4, "conv1_weight must be [M, C, 1, 1]");
    Shape& s = args.shape;
    s.m = conv1_weight.size(0);
    Saved& of = args.saved;
    of.pooled = saved_data(pooled, x, s.rows() * s.c, "pooled");
    of.squeezed = saved_data(squeezed, x, s.rows() * s.m, "squeezed");
    of.gates = saved_data(gates, x, s.rows() * s.c, "gates");
    of.mean = saved_data(mean, x, s.m, "mean");
    of.var = saved_data(var, x, s.m, "var");
    Parameters params(x);
    Params& p = args.params;
    p.conv1_weight = params.matrix(conv1_weight, s.m, s.c, "conv1_weight");
    p.bn_weight = params.vector(bn_weight, s.m, "bn_weight");
    p.bn_bias = params.numbers(bn_bias, s.m, "bn_bias");
    p.conv_h_weight = params.matrix(conv_h_weight, s.c, s.m, "conv_h_weight");
    p.conv_w_weight = params.matrix(conv_w_weight, s.c, s.m, "conv_w_weight");
    p.eps = eps;
    Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc);
    args.x = map_of(in, args.nhwc);
    args.grad = map_of(g, args.nhwc);

    MadeGradients made(args, x, &Backend::empty_map, needs, conv1_weight, bn_weight, conv_h_weight, conv_w_weight);
    if (x.numel()) Backend::backward(args, x);
    else made.zero();
    return made.all();
  }

  static void update_running_stats(const MaybeTensor& running_mean, const MaybeTensor& running_var,
                                   const MaybeTensor& num_batches_tracked, const Tensor& squeezed, const Tensor& mean,
                                   const Tensor& var, std::optional<double> momentum) {
    check_device(squeezed, mean, "squeezed");
    CHECK(squeezed.dim() > 0, "squeezed must be [R, M], or a map [N, M, H, W]");
    for (const Tensor* t : {&mean, &var}) {
      const char* name = t == &mean ? "mean" : "var";
      check_device(*t, mean, name);
      CHECK(t->scalar_type() == acc_of(*t) && t->scalar_type() == mean.scalar_type() && t->is_contiguous() &&
                t->numel() == mean.numel(),
            name, " is not what the forward pass saved");
      data_of(*t, name);
    }
    RunningStatistics running = running_of(running_mean, running_var, num_batches_tracked, momentum, mean, std::nullopt);
    Backend::update(running, mean, var, mean.numel() ? squeezed.numel() / mean.numel() : 0);
  }
};

#define PARAMETER_SCHEMA                                                                                              \
  "Tensor conv1_weight, Tensor? conv1_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, "    \
  "float eps, Tensor conv_h_weight, Tensor? conv_h_bias, Tensor conv_w_weight, Tensor? conv_w_bias, "

// Every backend's operators, in a block of definitions.
template <class Library> void define_operators(Library& m) {
  m.def("attend(Tensor x, " PARAMETER_SCHEMA "int activation, bool skip) -> Tensor");
  m.def("attend_out(Tensor x, " PARAMETER_SCHEMA "int activation, bool skip, Tensor(a!) result) -> ()");
  m.def("attend_train(Tensor x, " PARAMETER_SCHEMA "int norm, int activation, bool skip) -> "
        "(Tensor out, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var)");
  m.def("attend_train_update(Tensor x, " PARAMETER_SCHEMA "int norm, int activation, bool skip, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum) -> "
        "(Tensor out, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var)");
  m.def("attend_backward(Tensor grad, Tensor x, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var, "
        "Tensor conv1_weight, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor conv_h_weight, Tensor conv_w_weight, "
        "int norm, int activation, bool skip, int needs) -> (Tensor dx, Tensor dconv1_weight, Tensor dconv1_bias, "
        "Tensor dbn_weight, Tensor dbn_bias, Tensor dconv_h_weight, Tensor dconv_h_bias, Tensor dconv_w_weight, "
        "Tensor dconv_w_bias)");
  m.def("update_running_stats(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
        "Tensor squeezed, Tensor mean, Tensor var, float? momentum) -> ()");
  m.def("pool(Tensor x) -> Tensor");
  m.def("pool_backward(Tensor grad, Tensor x) -> Tensor");
  m.def("gate(Tensor x, Tensor s_h, Tensor s_w, bool skip) -> Tensor");
  m.def("gate_backward(Tensor grad, Tensor x, Tensor s_h, Tensor s_w, bool skip) -> (Tensor dx, Tensor ds_h, Tensor ds_w)");
}

// Those of one backend, in a block of implementations; pool, gate and their backward passes are the file's own.
#define COORDATT_IMPLEMENT(m, Backend)                                                       \
  m.impl("attend", TORCH_BOX(&Fused<Backend>::attend));                                      \
  m.impl("attend_out", TORCH_BOX(&Fused<Backend>::attend_out));                              \
  m.impl("attend_train", TORCH_BOX(&Fused<Backend>::attend_train));                          \
  m.impl("attend_train_update", TORCH_BOX(&Fused<Backend>::attend_train_update));            \
  m.impl("attend_backward", TORCH_BOX(&Fused<Backend>::attend_backward));                    \
  m.impl("update_running_stats", TORCH_BOX(&Fused<Backend>::update_running_stats));          \
  m.impl("pool", TORCH_BOX(&pool));                                                          \
  m.impl("pool_backward", TORCH_BOX(&pool_backward));                                        \
  m.impl("gate", TORCH_BOX(&gate));                                                          \
  m.impl("gate_backward", TORCH_BOX(&gate_backward))

}  // namespace bindings
}  // namespace coordatt
