// Schemas and bindings, on the libtorch stable ABI: the only file of csrc that sees torch. It checks what the kernels
// take for granted, allocates, and turns tensors into the structs of coordatt.h.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "coordatt.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace {

using coordatt::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

#define CHECK(condition, ...) STD_TORCH_CHECK(condition, "coordatt_fast: ", __VA_ARGS__)

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return DType::f32;
}

ScalarType acc_of(const Tensor& x) { return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.begin(), strides.begin(), (int32_t)dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor empty1(int64_t n, ScalarType dtype) { return empty_strided({n}, {1}, dtype); }
Tensor empty2(int64_t rows, int64_t columns, ScalarType dtype) { return empty_strided({rows, columns}, {columns, 1}, dtype); }

// channels_last, by the strides: channels dense. A map of one channel counts as nchw.
bool is_nhwc(const Tensor& t) { return t.size(1) > 1 && t.stride(1) == 1; }

Tensor empty_map(const Tensor& like, bool nhwc) {
  int64_t n = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3);
  int64_t sizes[4] = {n, c, h, w}, dense[4] = {c * h * w, h * w, w, 1}, last[4] = {h * w * c, 1, w * c, c};
  int64_t* strides = nhwc ? last : dense;
  int64_t bytes = n * c * h * w * (int64_t)like.element_size();
  void* block = bytes >= coordatt::block_from ? coordatt::take_block(bytes) : nullptr;
  if (block)
    return torch::stable::from_blob(block, {sizes, 4}, {strides, 4}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    like.scalar_type(), coordatt::give_block);
  return empty_strided({n, c, h, w}, {strides[0], strides[1], strides[2], strides[3]}, like.scalar_type());
}

// Whether the kernels can walk it as it is: dense planes (nchw), or dense channels of evenly spaced pixels (nhwc).
bool is_native(const Tensor& t, bool nhwc) {
  int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  if (!nhwc) return (w == 1 || t.stride(3) == 1) && (h == 1 || t.stride(2) == w);
  int64_t step = w > 1 ? t.stride(3) : t.stride(2);
  return (c == 1 || t.stride(1) == 1) && (w == 1 || h == 1 || t.stride(2) == w * step);
}

coordatt::Map map_of(const Tensor& t, bool nhwc) {
  coordatt::Map m;
  m.data = t.mutable_data_ptr();
  m.image = t.stride(0);
  m.step = !nhwc ? t.stride(1) : t.size(3) > 1 ? t.stride(3) : t.stride(2);
  return m;
}

Tensor native(const Tensor& t, bool nhwc) {
  if (is_native(t, nhwc)) return t;
  Tensor copy = empty_map(t, nhwc);
  torch::stable::copy_(copy, t);
  return copy;
}

void check_map(const Tensor& t, const char* name) {
  CHECK(t.dim() == 4, name, " must be [N, C, H, W], got ", t.dim(), " dimensions");
  CHECK(t.is_cpu(), name, " must be on the CPU");
  dtype_of(t, name);
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_map(t, name);
  CHECK(t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
  for (int64_t d = 0; d < 4; ++d)
    CHECK(t.size(d) == x.size(d), name, " must have x's shape: size ", t.size(d), " at dimension ", d, ", x has ", x.size(d));
}

// Parameters, dense and kept alive for the call.
class Parameters {
 public:
  explicit Parameters(const Tensor& x) : x_(x) {}
  coordatt::Param take(const Tensor& t, int64_t count, const char* name) {
    coordatt::Param p;
    p.dtype = dtype_of(t, name);
    CHECK(t.is_cpu(), name, " must be on the CPU");
    CHECK(t.numel() == count, name, " must have ", count, " elements, got ", t.numel());
    CHECK(t.scalar_type() == x_.scalar_type() || t.scalar_type() == acc_of(x_), name,
          " must have x's dtype, or float32 beside half-precision x");
    if (!t.is_contiguous()) {
      CHECK(copies_ < 10, "too many non-contiguous parameters");
      kept_[copies_] = torch::stable::contiguous(t);
      p.data = kept_[copies_++]->mutable_data_ptr();
    } else {
      p.data = t.mutable_data_ptr();
    }
    return p;
  }
  coordatt::Param take(const MaybeTensor& t, int64_t count, const char* name) {
    return t ? take(*t, count, name) : coordatt::Param{};
  }

 private:
  const Tensor& x_;
  MaybeTensor kept_[10];
  int copies_ = 0;
};

void run_tasks(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

coordatt::Threads threads() { return {(int)torch::stable::get_num_threads(), run_tasks}; }

coordatt::Call call_of(const Tensor& x, int64_t norm, int64_t activation, bool skip) {
  check_map(x, "x");
  CHECK(norm >= 0 && norm <= 2, "norm must be 0, 1 or 2, got ", norm);
  CHECK(activation >= 0 && activation <= 3, "activation must be 0 to 3, got ", activation);
  coordatt::Call call;
  call.shape = {x.size(0), x.size(1), x.size(2), x.size(3), 0};
  call.dtype = dtype_of(x, "x");
  call.nhwc = is_nhwc(x);
  call.norm = (coordatt::Norm)norm;
  call.activation = (coordatt::Activation)activation;
  call.skip = skip;
  return call;
}

struct ForwardTensors {
  const Tensor& conv1_weight; const MaybeTensor& conv1_bias;
  const MaybeTensor& bn_weight; const MaybeTensor& bn_bias;
  const MaybeTensor& bn_mean; const MaybeTensor& bn_var;
  double eps;
  const Tensor& conv_h_weight; const MaybeTensor& conv_h_bias;
  const Tensor& conv_w_weight; const MaybeTensor& conv_w_bias;
};

void set_params(coordatt::Call& call, const ForwardTensors& t, Parameters& params) {
  CHECK(t.conv1_weight.dim() == 4, "conv1_weight must be [M, C, 1, 1]");
  int64_t m = call.shape.m = t.conv1_weight.size(0), c = call.shape.c;
  CHECK(m >= 1, "conv1_weight must have at least one output channel");
  coordatt::Params& p = call.params;
  p.conv1_weight = params.take(t.conv1_weight, m * c, "conv1_weight");
  p.conv1_bias = params.take(t.conv1_bias, m, "conv1_bias");
  p.bn_weight = params.take(t.bn_weight, m, "bn_weight");
  p.bn_bias = params.take(t.bn_bias, m, "bn_bias");
  if (call.norm == coordatt::Norm::given) {
    CHECK(t.bn_mean.has_value() && t.bn_var.has_value(), "norm 1 needs bn_mean and bn_var");
    p.mean = params.take(t.bn_mean, m, "bn_mean");
    p.var = params.take(t.bn_var, m, "bn_var");
  }
  p.conv_h_weight = params.take(t.conv_h_weight, c * m, "conv_h_weight");
  p.conv_h_bias = params.take(t.conv_h_bias, c, "conv_h_bias");
  p.conv_w_weight = params.take(t.conv_w_weight, c * m, "conv_w_weight");
  p.conv_w_bias = params.take(t.conv_w_bias, c, "conv_w_bias");
  p.eps = t.eps;
}

void infer(const Tensor& x, const ForwardTensors& tensors, int64_t activation, bool skip, const MaybeTensor& given_out,
           MaybeTensor& made_out) {
  CHECK(tensors.bn_mean.has_value() == tensors.bn_var.has_value(), "bn_mean and bn_var go together");
  coordatt::ForwardArgs args{};
  (coordatt::Call&)args = call_of(x, tensors.bn_mean ? 1 : 0, activation, skip);
  Parameters params(x);
  set_params(args, tensors, params);
  Tensor in = native(x, args.nhwc);
  Tensor out = given_out ? *given_out : empty_map(x, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.out = map_of(out, args.nhwc);
  coordatt::forward(args, threads());
  if (!given_out) made_out = out;
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

Tensor attend(const Tensor& x, FORWARD_PARAMETERS, int64_t activation, bool skip) {
  MaybeTensor out;
  infer(x, FORWARD_TENSORS, activation, skip, std::nullopt, out);
  return *out;
}

void attend_out(const Tensor& x, FORWARD_PARAMETERS, int64_t activation, bool skip, const Tensor& out) {
  check_like(out, x, "out");
  bool nhwc = is_nhwc(x);
  MaybeTensor made;
  bool writable = is_native(out, nhwc);
  for (int64_t d = 0; d < 4; ++d) writable = writable && (out.size(d) <= 1 || out.stride(d) > 0);
  infer(x, FORWARD_TENSORS, activation, skip, writable ? MaybeTensor(out) : std::nullopt, made);
  Tensor to = out;
  if (!writable) torch::stable::copy_(to, *made);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attend_train(const Tensor& x, FORWARD_PARAMETERS, int64_t norm,
                                                                       int64_t activation, bool skip) {
  coordatt::ForwardArgs args{};
  (coordatt::Call&)args = call_of(x, norm, activation, skip);
  Parameters params(x);
  set_params(args, FORWARD_TENSORS, params);
  const coordatt::Shape& s = args.shape;
  ScalarType acc = acc_of(x);
  Tensor in = native(x, args.nhwc), out = empty_map(x, args.nhwc);
  Tensor pooled = empty2(s.rows(), s.c, acc), squeezed = empty2(s.rows(), s.m, acc), gates = empty2(s.rows(), s.c, acc);
  Tensor mean = empty1(s.m, acc), var = empty1(s.m, acc);
  if (norm == 0 || (norm == 2 && s.n * s.c * s.h * s.w == 0)) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(var, 1);
  }
  args.x = map_of(in, args.nhwc);
  args.out = map_of(out, args.nhwc);
  args.saved = {pooled.mutable_data_ptr(), squeezed.mutable_data_ptr(), gates.mutable_data_ptr(), mean.mutable_data_ptr(),
                var.mutable_data_ptr()};
  coordatt::forward(args, threads());
  return {out, pooled, squeezed, gates, mean, var};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attend_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& squeezed,
                          const Tensor& gates, const Tensor& mean, const Tensor& var, const Tensor& conv1_weight,
                          const MaybeTensor& bn_weight, const MaybeTensor& bn_bias, double eps, const Tensor& conv_h_weight,
                          const Tensor& conv_w_weight, int64_t norm, int64_t activation, bool skip, int64_t needs) {
  coordatt::BackwardArgs args{};
  (coordatt::Call&)args = call_of(x, norm, activation, skip);
  check_like(grad, x, "grad");
  CHECK(conv1_weight.dim() == 4, "conv1_weight must be [M, C, 1, 1]");
  coordatt::Shape& s = args.shape;
  s.m = conv1_weight.size(0);
  ScalarType acc = acc_of(x);
  auto check_saved = [&](const Tensor& t, int64_t count, const char* name) {
    CHECK(t.scalar_type() == acc && t.is_contiguous() && t.numel() == count, name, " is not what the forward pass saved");
    return t.mutable_data_ptr();
  };
  args.saved = {check_saved(pooled, s.rows() * s.c, "pooled"), check_saved(squeezed, s.rows() * s.m, "squeezed"),
                check_saved(gates, s.rows() * s.c, "gates"), check_saved(mean, s.m, "mean"), check_saved(var, s.m, "var")};
  Parameters params(x);
  coordatt::Params& p = args.params;
  p.conv1_weight = params.take(conv1_weight, s.m * s.c, "conv1_weight");
  p.bn_weight = params.take(bn_weight, s.m, "bn_weight");
  p.bn_bias = params.take(bn_bias, s.m, "bn_bias");
  p.conv_h_weight = params.take(conv_h_weight, s.c * s.m, "conv_h_weight");
  p.conv_w_weight = params.take(conv_w_weight, s.c * s.m, "conv_w_weight");
  p.eps = eps;
  Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.grad = map_of(g, args.nhwc);

  auto wanted = [&](int i) { return (needs >> i & 1) != 0; };
  Tensor dx = wanted(0) ? empty_map(x, args.nhwc) : empty1(0, x.scalar_type());
  if (wanted(0)) args.out.dx = map_of(dx, args.nhwc);
  auto vector = [&](int i, int64_t size, const Tensor& like, coordatt::Param& to) {
    Tensor t = empty1(wanted(i) ? size : 0, like.scalar_type());
    if (wanted(i)) to = {t.mutable_data_ptr(), dtype_of(like, "parameter")};
    return t;
  };
  auto weight = [&](int i, int64_t rows, int64_t columns, const Tensor& like, coordatt::Param& to) {
    if (!wanted(i)) return empty1(0, like.scalar_type());
    Tensor t = empty_strided({rows, columns, 1, 1}, {columns, 1, 1, 1}, like.scalar_type());
    to = {t.mutable_data_ptr(), dtype_of(like, "parameter")};
    return t;
  };
  const Tensor& bn = bn_weight ? *bn_weight : conv1_weight;
  coordatt::Gradients& out = args.out;
  Tensor d1 = weight(1, s.m, s.c, conv1_weight, out.conv1_weight), d2 = vector(2, s.m, conv1_weight, out.conv1_bias);
  Tensor d3 = vector(3, s.m, bn, out.bn_weight), d4 = vector(4, s.m, bn, out.bn_bias);
  Tensor d5 = weight(5, s.c, s.m, conv_h_weight, out.conv_h_weight), d6 = vector(6, s.c, conv_h_weight, out.conv_h_bias);
  Tensor d7 = weight(7, s.c, s.m, conv_w_weight, out.conv_w_weight), d8 = vector(8, s.c, conv_w_weight, out.conv_w_bias);
  coordatt::backward(args, threads());
  return {dx, d1, d2, d3, d4, d5, d6, d7, d8};
}

template <class A>
void lerp(const Tensor& running, const Tensor& batch, double scale, double momentum, DType dtype) {
  const coordatt::MapKernels& k = coordatt::kernels().map[(int)dtype];
  int64_t size = (int64_t)running.element_size();
  const A* from = (const A*)batch.mutable_data_ptr();
  for (int64_t i = 0; i < running.numel(); ++i) {
    char* to = (char*)running.mutable_data_ptr() + i * running.stride(0) * size;
    A v;
    k.to_acc(to, &v, 1);
    v = (A)((1 - momentum) * v + momentum * scale * from[i]);
    k.from_acc(&v, to, 1);
  }
}

void update_running_stats(const MaybeTensor& running_mean, const MaybeTensor& running_var,
                          const MaybeTensor& num_batches_tracked, const Tensor& squeezed, const Tensor& mean,
                          const Tensor& var, std::optional<double> momentum) {
  double rows = (double)squeezed.size(0), factor = momentum ? *momentum : 0;
  if (num_batches_tracked) {
    CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->is_cpu(),
          "num_batches_tracked must be int64 on the CPU");
    int64_t seen = ++*(int64_t*)num_batches_tracked->mutable_data_ptr();
    if (!momentum) factor = 1.0 / (double)seen;
  }
  if (rows == 0) return;
  auto update = [&](const MaybeTensor& running, const Tensor& batch, double scale, const char* name) {
    if (!running) return;
    CHECK(running->is_cpu() && running->dim() == 1 && running->numel() == batch.numel(), name, " must be [M] on the CPU");
    DType dtype = dtype_of(*running, name);
    bool wide = batch.scalar_type() == ScalarType::Double;
    CHECK(wide == (dtype == DType::f64), name, " must have x's dtype, or float32 beside half-precision x");
    if (wide) lerp<double>(*running, batch, scale, factor, dtype);
    else lerp<float>(*running, batch, scale, factor, dtype);
  };
  update(running_mean, mean, 1, "running_mean");
  update(running_var, var, rows > 1 ? rows / (rows - 1) : 1, "running_var");
}

using Trained = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Both in one call, which saves a seventh of the time of a small training forward.
Trained attend_train_update(const Tensor& x, FORWARD_PARAMETERS, int64_t norm, int64_t activation, bool skip,
                            const MaybeTensor& running_mean, const MaybeTensor& running_var,
                            const MaybeTensor& num_batches_tracked, std::optional<double> momentum) {
  CHECK(norm == 2, "running statistics move under batch statistics (norm 2) only");
  Trained r = attend_train(x, conv1_weight, conv1_bias, bn_weight, bn_bias, bn_mean, bn_var, eps, conv_h_weight, conv_h_bias,
                           conv_w_weight, conv_w_bias, norm, activation, skip);
  update_running_stats(running_mean, running_var, num_batches_tracked, std::get<2>(r), std::get<4>(r), std::get<5>(r), momentum);
  return r;
}

Tensor pool(const Tensor& x) {
  coordatt::PoolArgs args{};
  (coordatt::Call&)args = call_of(x, 0, 0, false);
  const coordatt::Shape& s = args.shape;
  Tensor in = native(x, args.nhwc);
  int64_t length = s.length();
  auto rows = [&](ScalarType t) {
    return empty_strided({s.n, s.c, length, 1}, {length * s.c, 1, s.c, s.c}, t);
  };
  Tensor pooled = rows(acc_of(x));
  args.x = map_of(in, args.nhwc);
  args.pooled = pooled.mutable_data_ptr();
  if (x.numel()) coordatt::pool(args, threads());
  if (x.scalar_type() == acc_of(x)) return pooled;
  Tensor out = rows(x.scalar_type());
  coordatt::kernels().map[(int)args.dtype].from_acc(pooled.mutable_data_ptr(), out.mutable_data_ptr(), pooled.numel());
  return out;
}

// Small tensors of the middle from anywhere: [outer, C, length, 1] or [.., 1, length] of any dtype and strides, as dense
// rows [outer * length, C] in the accumulate type.
void gather_rows(const Tensor& t, int64_t length_dim, ScalarType acc, void* to) {
  const coordatt::MapKernels& k = coordatt::kernels().map[(int)dtype_of(t, "logits")];
  bool wide = acc == ScalarType::Double;
  CHECK(wide == (t.scalar_type() == ScalarType::Double), "logits must be float64 exactly where x is");
  int64_t n = t.size(0), c = t.size(1), length = t.size(length_dim), size = (int64_t)t.element_size(), bytes = wide ? 8 : 4;
  char* out = (char*)to;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < length; ++l, out += c * bytes) {
      char* from = (char*)t.mutable_data_ptr() + (i * t.stride(0) + l * t.stride(length_dim)) * size;
      if (t.stride(1) == 1) {
        k.to_acc(from, out, c);
      } else {
        for (int64_t j = 0; j < c; ++j) k.to_acc(from + j * t.stride(1) * size, out + j * bytes, 1);
      }
    }
}

Tensor pool_backward(const Tensor& grad, const Tensor& x) {
  coordatt::PoolArgs args{};
  (coordatt::Call&)args = call_of(x, 0, 0, false);
  const coordatt::Shape& s = args.shape;
  CHECK(grad.dim() == 4 && grad.size(0) == s.n && grad.size(1) == s.c && grad.size(2) == s.length() && grad.size(3) == 1,
        "grad must be [N, C, H + W, 1]");
  Tensor rows = empty2(s.n * s.length(), s.c, acc_of(x)), dx = empty_map(x, args.nhwc);
  gather_rows(grad, 2, acc_of(x), rows.mutable_data_ptr());
  args.x = map_of(dx, args.nhwc);
  args.pooled = rows.mutable_data_ptr();
  if (x.numel()) coordatt::pool_backward(args, threads());
  return dx;
}

// [R, C] gates from logits.
Tensor gates_of(const coordatt::Call& call, const Tensor& s_h, const Tensor& s_w, ScalarType acc) {
  const coordatt::Shape& s = call.shape;
  CHECK(s_h.dim() == 4 && s_h.size(0) == s.n && s_h.size(1) == s.c && s_h.size(2) == s.h && s_h.size(3) == 1 && s_h.is_cpu(),
        "s_h must be [N, C, H, 1] on the CPU");
  CHECK(s_w.dim() == 4 && s_w.size(0) == s.n && s_w.size(1) == s.c && s_w.size(2) == 1 && s_w.size(3) == s.w && s_w.is_cpu(),
        "s_w must be [N, C, 1, W] on the CPU");
  Tensor gates = empty2(s.rows(), s.c, acc);
  gather_rows(s_h, 2, acc, gates.mutable_data_ptr());
  gather_rows(s_w, 3, acc, (char*)gates.mutable_data_ptr() + s.n * s.h * s.c * (acc == ScalarType::Double ? 8 : 4));
  coordatt::kernels().mix[acc == ScalarType::Double].sigmoid(gates.mutable_data_ptr(), gates.numel());
  return gates;
}

Tensor gate(const Tensor& x, const Tensor& s_h, const Tensor& s_w, bool skip) {
  coordatt::GateArgs args{};
  (coordatt::Call&)args = call_of(x, 0, 0, skip);
  Tensor gates = gates_of(args, s_h, s_w, acc_of(x));
  Tensor in = native(x, args.nhwc), out = empty_map(x, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.out = map_of(out, args.nhwc);
  args.gates = gates.mutable_data_ptr();
  if (x.numel()) coordatt::gate(args, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& x, const Tensor& s_h, const Tensor& s_w,
                                                bool skip) {
  coordatt::GateArgs args{};
  (coordatt::Call&)args = call_of(x, 0, 0, skip);
  check_like(grad, x, "grad");
  const coordatt::Shape& s = args.shape;
  ScalarType acc = acc_of(x);
  Tensor gates = gates_of(args, s_h, s_w, acc), logits = empty2(s.rows(), s.c, acc);
  Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc), dx = empty_map(x, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.grad = map_of(g, args.nhwc);
  args.out = map_of(dx, args.nhwc);
  args.gates = gates.mutable_data_ptr();
  args.dlogits = logits.mutable_data_ptr();
  if (x.numel()) coordatt::gate_backward(args, threads());
  Tensor ds_h = empty_strided({s.n, s.c, s.h, 1}, {s.h * s.c, 1, s.c, s.c}, s_h.scalar_type());
  Tensor ds_w = empty_strided({s.n, s.c, 1, s.w}, {s.w * s.c, 1, s.w * s.c, s.c}, s_w.scalar_type());
  int64_t bytes = acc == ScalarType::Double ? 8 : 4;
  const coordatt::Kernels& k = coordatt::kernels();
  k.map[(int)dtype_of(s_h, "s_h")].from_acc(logits.mutable_data_ptr(), ds_h.mutable_data_ptr(), ds_h.numel());
  k.map[(int)dtype_of(s_w, "s_w")].from_acc((char*)logits.mutable_data_ptr() + s.n * s.h * s.c * bytes,
                                            ds_w.mutable_data_ptr(), ds_w.numel());
  return {dx, ds_h, ds_w};
}

std::string build_info() {
  return std::string("{\"version\": \"" COORDATT_VERSION "\", \"torch_built\": \"" COORDATT_TORCH_BUILT "\", \"compiler\": \"") +
         COORDATT_COMPILER "\", \"simd_compiled\": \"" + coordatt::compiled_levels() + "\", \"cuda\": false}";
}

std::string simd_level() { return coordatt::kernels().level; }

void set_simd_level(std::string level) {
  const char* problem = coordatt::set_level(level.c_str());
  CHECK(!problem, "SIMD level '", level, "': ", problem ? problem : "", "; compiled in: ", coordatt::compiled_levels());
}

}  // namespace

#define PARAMETER_SCHEMA                                                                                              \
  "Tensor conv1_weight, Tensor? conv1_bias, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, "    \
  "float eps, Tensor conv_h_weight, Tensor? conv_h_bias, Tensor conv_w_weight, Tensor? conv_w_bias, "

STABLE_TORCH_LIBRARY(coordatt_fast, m) {
  m.def("attend(Tensor x, " PARAMETER_SCHEMA "int activation, bool skip) -> Tensor");
  m.def("attend_out(Tensor x, " PARAMETER_SCHEMA "int activation, bool skip, *, Tensor(a!) out) -> ()");
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
  m.def("build_info() -> str");
  m.def("simd_level() -> str");
  m.def("set_simd_level(str level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(coordatt_fast, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("attend_out", TORCH_BOX(&attend_out));
  m.impl("attend_train", TORCH_BOX(&attend_train));
  m.impl("attend_train_update", TORCH_BOX(&attend_train_update));
  m.impl("attend_backward", TORCH_BOX(&attend_backward));
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
}

STABLE_TORCH_LIBRARY_IMPL(coordatt_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("simd_level", TORCH_BOX(&simd_level));
  m.impl("set_simd_level", TORCH_BOX(&set_simd_level));
}
