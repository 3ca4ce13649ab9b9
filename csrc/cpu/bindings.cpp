// The CPU backend's operators: what bindings.h leaves to a backend, and the passes alone.
#include "bindings.h"
#include "cpu/blocks.h"
#include "cpu/kernels.h"

namespace coordatt {
namespace bindings {
namespace {

void run_tasks(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

Threads threads() { return {(int)torch::stable::get_num_threads(), run_tasks}; }

template <class A> void lerp(const Param& running, int64_t step, const A* batch, int64_t count, double scale, double momentum) {
  if (running.dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32)) {  // two of 960 numbers: 5 us; as halves go, 54
    A* to = (A*)running.data;
    for (int64_t i = 0; i < count; ++i) to[i * step] = (A)fma(momentum * scale, (double)batch[i], (1 - momentum) * to[i * step]);
    return;
  }
  const MapKernels& k = kernels().map[(int)running.dtype];
  int64_t size = bytes_of(running.dtype);
  for (int64_t i = 0; i < count; ++i) {
    char* to = (char*)running.data + i * step * size;
    A v;
    k.to_acc(to, &v, 1);
    v = (A)fma(momentum * scale, (double)batch[i], (1 - momentum) * v);
    k.from_acc(&v, to, 1);
  }
}

template <class A> void move(const RunningStatistics& r, const void* mean, const void* var, int64_t m, int64_t rows) {
  double momentum = r.momentum;
  if (r.tracked) {
    int64_t seen = ++*r.tracked;
    if (r.cumulative) momentum = 1.0 / (double)seen;
  }
  if (rows == 0) return;
  if (r.mean) lerp(r.mean, r.mean_step, (const A*)mean, m, 1, momentum);
  if (r.var) lerp(r.var, r.var_step, (const A*)var, m, rows > 1 ? (double)rows / (double)(rows - 1) : 1, momentum);
}

struct Cpu {
  static bool is_native(const Tensor& t, bool nhwc) { return has_dense_planes(t, nhwc); }

  static Tensor empty_map(const Tensor& like, bool nhwc) {
    int64_t n = like.size(0), c = like.size(1), h = like.size(2), w = like.size(3), sizes[4] = {n, c, h, w};
    MapStrides strides(like, nhwc);
    int64_t bytes;
    bool absurd = __builtin_mul_overflow(like.numel(), (int64_t)like.element_size(), &bytes);  // torch says it best
    void* block = !absurd && bytes >= block_from ? take_block(bytes) : nullptr;
    if (block)
      return torch::stable::from_blob(block, {sizes, 4}, {strides.of, 4},
                                      torch::stable::Device(torch::headeronly::DeviceType::CPU), like.scalar_type(), give_block);
    const int64_t* of = strides.of;
    return empty_strided(like, {n, c, h, w}, {of[0], of[1], of[2], of[3]}, like.scalar_type());
  }

  static void forward(const ForwardArgs& args, const RunningStatistics& running, const Tensor&) {
    coordatt::forward(args, threads());
    const Saved& s = args.saved;
    if (args.dtype == DType::f64) move<double>(running, s.mean, s.var, args.shape.m, args.shape.rows());
    else move<float>(running, s.mean, s.var, args.shape.m, args.shape.rows());
  }

  static void backward(const BackwardArgs& args, const Tensor&) { coordatt::backward(args, threads()); }

  static void update(const RunningStatistics& running, const Tensor& mean, const Tensor& var, int64_t rows) {
    const void *m = mean.mutable_data_ptr(), *v = var.mutable_data_ptr();
    if (mean.scalar_type() == ScalarType::Double) move<double>(running, m, v, mean.numel(), rows);
    else move<float>(running, m, v, mean.numel(), rows);
  }
};

Tensor native(const Tensor& t, bool nhwc) { return Fused<Cpu>::native(t, nhwc); }
Tensor empty_map(const Tensor& like, bool nhwc) { return Cpu::empty_map(like, nhwc); }

Tensor pool(const Tensor& x) {
  PoolArgs args(call_of(x, 0, 0, false));
  const Shape& s = args.shape;
  Tensor in = native(x, args.nhwc);
  int64_t length = s.length();
  auto rows = [&](ScalarType t) {
    return empty_strided(x, {s.n, s.c, length, 1}, {length * s.c, 1, s.c, s.c}, t);
  };
  Tensor pooled = rows(acc_of(x));
  args.x = map_of(in, args.nhwc);
  args.pooled = pooled.mutable_data_ptr();
  if (x.numel()) coordatt::pool(args, threads());
  if (x.scalar_type() == acc_of(x)) return pooled;
  Tensor out = rows(x.scalar_type());
  kernels().map[(int)args.dtype].from_acc(pooled.mutable_data_ptr(), out.mutable_data_ptr(), pooled.numel());
  return out;
}

// Small tensors of the middle from anywhere: [outer, C, length, 1] or [.., 1, length] of any dtype and strides, as dense
// rows [outer * length, C] in the accumulate type.
void gather_rows(const Tensor& t, int64_t length_dim, ScalarType acc, void* to) {
  const MapKernels& k = kernels().map[(int)dtype_of(t, "logits")];
  bool wide = acc == ScalarType::Double;
  CHECK(wide == (t.scalar_type() == ScalarType::Double), "logits must be float64 exactly where x is");
  int64_t n = t.size(0), c = t.size(1), length = t.size(length_dim), size = (int64_t)t.element_size(), bytes = wide ? size : 4;
  const void* data = data_of(t, "logits");
  char* out = (char*)to;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t l = 0; l < length; ++l, out += c * bytes) {
      char* from = (char*)data + (i * t.stride(0) + l * t.stride(length_dim)) * size;
      if (t.stride(1) == 1) {
        k.to_acc(from, out, c);
      } else {
        for (int64_t j = 0; j < c; ++j) k.to_acc(from + j * t.stride(1) * size, out + j * bytes, 1);
      }
    }
}

Tensor pool_backward(const Tensor& grad, const Tensor& x) {
  PoolArgs args(call_of(x, 0, 0, false));
  const Shape& s = args.shape;
  CHECK(grad.dim() == 4 && grad.size(0) == s.n && grad.size(1) == s.c && grad.size(2) == s.length() && grad.size(3) == 1,
        "grad must be [N, C, H + W, 1]");
  check_device(grad, x, "grad");
  Tensor rows = empty2(x, s.n * s.length(), s.c, acc_of(x)), dx = empty_map(x, args.nhwc);
  gather_rows(grad, 2, acc_of(x), rows.mutable_data_ptr());
  args.x = map_of(dx, args.nhwc);
  args.pooled = rows.mutable_data_ptr();
  if (x.numel()) coordatt::pool_backward(args, threads());
  return dx;
}

// [R, C] gates from logits.
Tensor gates_of(const Tensor& x, const Call& call, const Tensor& s_h, const Tensor& s_w, ScalarType acc) {
  const Shape& s = call.shape;
  check_logits(s, x, s_h, s_w);
  Tensor gates = empty2(x, s.rows(), s.c, acc);
  gather_rows(s_h, 2, acc, gates.mutable_data_ptr());
  gather_rows(s_w, 3, acc, (char*)gates.mutable_data_ptr() + s.n * s.h * s.c * (int64_t)gates.element_size());
  kernels().mix[acc == ScalarType::Double].sigmoid(gates.mutable_data_ptr(), gates.numel());
  return gates;
}

Tensor gate(const Tensor& x, const Tensor& s_h, const Tensor& s_w, bool skip) {
  GateArgs args(call_of(x, 0, 0, skip));
  Tensor gates = gates_of(x, args, s_h, s_w, acc_of(x));
  Tensor in = native(x, args.nhwc), out = empty_map(x, makes_nhwc(x, skip));
  args.x = map_of(in, args.nhwc);
  args.out = map_of(out, args.nhwc);
  args.gates = gates.mutable_data_ptr();
  if (x.numel()) coordatt::gate(args, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& x, const Tensor& s_h, const Tensor& s_w,
                                                bool skip) {
  GateArgs args(call_of(x, 0, 0, skip));
  check_like(grad, x, "grad");
  const Shape& s = args.shape;
  ScalarType acc = acc_of(x);
  Tensor gates = gates_of(x, args, s_h, s_w, acc), logits = empty2(x, s.rows(), s.c, acc);
  Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc), dx = empty_map(x, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.grad = map_of(g, args.nhwc);
  args.out = map_of(dx, args.nhwc);
  args.gates = gates.mutable_data_ptr();
  args.dlogits = logits.mutable_data_ptr();
  if (x.numel()) coordatt::gate_backward(args, threads());
  Tensor ds_h = empty_strided(x, {s.n, s.c, s.h, 1}, {s.h * s.c, 1, s.c, s.c}, s_h.scalar_type());
  Tensor ds_w = empty_strided(x, {s.n, s.c, 1, s.w}, {s.w * s.c, 1, s.w * s.c, s.c}, s_w.scalar_type());
  int64_t bytes = (int64_t)logits.element_size();
  const Kernels& k = kernels();
  k.map[(int)dtype_of(s_h, "s_h")].from_acc(logits.mutable_data_ptr(), ds_h.mutable_data_ptr(), ds_h.numel());
  k.map[(int)dtype_of(s_w, "s_w")].from_acc((char*)logits.mutable_data_ptr() + s.n * s.h * s.c * bytes,
                                            ds_w.mutable_data_ptr(), ds_w.numel());
  return {dx, ds_h, ds_w};
}

// The block with a normalisation and an activation before it.

struct BeforeTensors {
  const MaybeTensor &weight, &bias, &mean, &var;
  double eps;
};

Before before_of(const Tensor& x, const BeforeTensors& t, int64_t norm, int64_t activation, Parameters& params) {
  check_map(x, "x");
  CHECK(norm == (int64_t)Norm::given || norm == (int64_t)Norm::batch, "before_norm must be 1 or 2, got ", norm);
  CHECK(activation >= no_activation && activation < activations, "before_activation must be -1 to ", activations - 1, ", got ",
        activation);
  CHECK(!(t.eps < 0) && !(t.eps == 0 && norm == (int64_t)Norm::batch), "before_eps is ", t.eps,
        ", expected a positive number, or zero beside given statistics");
  Before before;
  before.norm = (Norm)norm;
  before.activation = (int)activation;
  const int64_t c = x.size(1);
  before.weight = params.numbers(t.weight, c, "before_weight");
  before.bias = params.numbers(t.bias, c, "before_bias");
  before.eps = t.eps;
  if (before.norm == Norm::given) {
    CHECK(t.mean && t.var, "before_norm 1 needs before_mean and before_var");
    before.mean = params.vector(t.mean, c, "before_mean");
    before.var = params.vector(t.var, c, "before_var");
  }
  return before;
}

#define BEFORE_PARAMETERS                                                                                    \
  const MaybeTensor &before_weight, const MaybeTensor &before_bias, const MaybeTensor &before_mean,          \
      const MaybeTensor &before_var, double before_eps
#define BEFORE_TENSORS BeforeTensors{before_weight, before_bias, before_mean, before_var, before_eps}

Tensor norm_attend(const Tensor& x, BEFORE_PARAMETERS, int64_t before_activation, FORWARD_PARAMETERS, int64_t activation, bool skip) {
  Parameters params(x);
  const Before before = before_of(x, BEFORE_TENSORS, (int64_t)Norm::given, before_activation, params);
  MaybeTensor out;
  Fused<Cpu>::infer(x, FORWARD_TENSORS, activation, skip, before, std::nullopt, out);
  return *out;
}

using NormTrained = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NormTrained norm_attend_train(const Tensor& x, BEFORE_PARAMETERS, int64_t before_norm, int64_t before_activation,
                              FORWARD_PARAMETERS, int64_t norm, int64_t activation, bool skip) {
  Parameters params(x);
  ForwardArgs args(call_of(x, norm, activation, skip));
  args.before = before_of(x, BEFORE_TENSORS, before_norm, before_activation, params);
  Tensor mean = empty1(x, x.size(1), acc_of(x)), var = empty1(x, x.size(1), acc_of(x));
  if (!x.numel() && args.before.norm == Norm::batch) {
    torch::stable::fill_(mean, 0);
    torch::stable::fill_(var, 1);
  }
  args.saved.before_mean = mean.mutable_data_ptr();
  args.saved.before_var = var.mutable_data_ptr();
  Trained made = Fused<Cpu>::train(args, x, FORWARD_TENSORS, std::nullopt, std::nullopt, std::nullopt, std::nullopt);
  return std::tuple_cat(std::move(made), std::make_tuple(mean, var));
}

using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NormGradients norm_attend_backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& squeezed,
                                   const Tensor& gates, const Tensor& mean, const Tensor& var, const Tensor& before_mean,
                                   const Tensor& before_var, const MaybeTensor& before_weight, const MaybeTensor& before_bias,
                                   double before_eps, int64_t before_norm, int64_t before_activation, const Tensor& conv1_weight,
                                   const MaybeTensor& bn_weight, const MaybeTensor& bn_bias, double eps,
                                   const Tensor& conv_h_weight, const Tensor& conv_w_weight, int64_t norm, int64_t activation,
                                   bool skip, int64_t needs) {
  Parameters params(x);
  BackwardArgs args(call_of(x, norm, activation, skip));
  const int64_t c = x.size(1);
  args.saved.before_mean = saved_data(before_mean, x, c, "before_mean");
  args.saved.before_var = saved_data(before_var, x, c, "before_var");
  const MaybeTensor given_mean = before_mean, given_var = before_var;
  args.before = before_of(x, {before_weight, before_bias, given_mean, given_var, before_eps}, before_norm, before_activation, params);
  const Tensor& like = before_weight ? *before_weight : before_mean;
  Tensor weight = MadeGradients::vector(needs & need_before_weight, c, like, args.out.before_weight);
  Tensor bias = MadeGradients::vector(needs & need_before_bias, c, before_bias ? *before_bias : like, args.out.before_bias);
  GradientTensors made = Fused<Cpu>::gradients(args, grad, x, pooled, squeezed, gates, mean, var, conv1_weight, bn_weight, bn_bias,
                                               eps, conv_h_weight, conv_w_weight, needs);
  if (!x.numel()) {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
  }
  return std::tuple_cat(std::move(made), std::make_tuple(weight, bias));
}

// A training call under batch statistics of several processes, in halves: moments, then sums, go to all in between.

// squeezed [R, M] and all that depends on M alone.
Call joined_call(const Tensor& x, const Tensor& squeezed, int64_t activation, bool skip, double eps) {
  Call call = call_of(x, (int64_t)Norm::batch, activation, skip);
  CHECK(squeezed.dim() == 2, "squeezed must be [R, M]");
  CHECK(eps > 0, "eps is ", eps, ", expected a positive number");
  call.shape.m = squeezed.size(1);
  call.params.eps = eps;
  return call;
}

// What every process handed in: [processes, width] float64, in the order of their ranks.
const double* joined_data(const Tensor& t, const Tensor& x, int64_t width, const char* name) {
  check_device(t, x, name);
  CHECK(t.scalar_type() == ScalarType::Double && t.is_contiguous() && t.dim() == 2 && t.size(0) >= 1 && t.size(1) == width, name,
        " has shape ", shape_of(t), ", expected [processes, ", width, "] in float64");
  return (const double*)data_of(t, name);
}

std::tuple<Tensor, Tensor, Tensor> attend_train_local(const Tensor& x, const Tensor& conv1_weight, const MaybeTensor& conv1_bias) {
  ForwardArgs args(call_of(x, (int64_t)Norm::batch, 0, false));
  Parameters params(x);
  CHECK(conv1_weight.dim() == 4 && conv1_weight.size(0) >= 1, "conv1_weight must be [M, C, 1, 1], M of at least 1");
  Shape& s = args.shape;
  s.m = conv1_weight.size(0);
  args.params.conv1_weight = params.matrix(conv1_weight, s.m, s.c, "conv1_weight");
  args.params.conv1_bias = params.vector(conv1_bias, s.m, "conv1_bias");
  Tensor in = native(x, args.nhwc), moments = empty1(x, 1 + 2 * s.m, ScalarType::Double);
  Tensor pooled = empty2(x, s.rows(), s.c, acc_of(x)), squeezed = empty2(x, s.rows(), s.m, acc_of(x));
  args.x = map_of(in, args.nhwc);
  args.saved.pooled = pooled.mutable_data_ptr();
  args.saved.squeezed = squeezed.mutable_data_ptr();
  forward_local(args, (double*)moments.mutable_data_ptr(), threads());
  return {pooled, squeezed, moments};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_train_joined(
    const Tensor& x, const Tensor& squeezed, const Tensor& moments, const MaybeTensor& bn_weight, const MaybeTensor& bn_bias,
    double eps, const Tensor& conv_h_weight, const MaybeTensor& conv_h_bias, const Tensor& conv_w_weight,
    const MaybeTensor& conv_w_bias, int64_t activation, bool skip, const MaybeTensor& running_mean, const MaybeTensor& running_var,
    const MaybeTensor& num_batches_tracked, std::optional<double> momentum) {
  ForwardArgs args(joined_call(x, squeezed, activation, skip, eps));
  const Shape& s = args.shape;
  Parameters params(x);
  args.params.bn_weight = params.numbers(bn_weight, s.m, "bn_weight");
  args.params.bn_bias = params.numbers(bn_bias, s.m, "bn_bias");
  args.params.conv_h_weight = params.matrix(conv_h_weight, s.c, s.m, "conv_h_weight");
  args.params.conv_h_bias = params.vector(conv_h_bias, s.c, "conv_h_bias");
  args.params.conv_w_weight = params.matrix(conv_w_weight, s.c, s.m, "conv_w_weight");
  args.params.conv_w_bias = params.vector(conv_w_bias, s.c, "conv_w_bias");
  ScalarType acc = acc_of(x);
  Tensor in = native(x, args.nhwc), out = empty_map(x, makes_nhwc(x, skip));
  Tensor gates = empty2(x, s.rows(), s.c, acc), mean = empty1(x, s.m, acc), var = empty1(x, s.m, acc);
  RunningStatistics running = running_of(running_mean, running_var, num_batches_tracked, momentum, mean, args.dtype);
  args.x = map_of(in, args.nhwc);
  args.out = map_of(out, args.nhwc);
  args.saved.squeezed = saved_data(squeezed, x, s.rows() * s.m, "squeezed");
  args.saved.gates = gates.mutable_data_ptr();
  args.saved.mean = mean.mutable_data_ptr();
  args.saved.var = var.mutable_data_ptr();
  int64_t rows = forward_joined(args, joined_data(moments, x, 1 + 2 * s.m, "moments"), moments.size(0), threads());
  if (acc == ScalarType::Double) move<double>(running, args.saved.mean, args.saved.var, s.m, rows);
  else move<float>(running, args.saved.mean, args.saved.var, s.m, rows);
  return {out, gates, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attend_backward_local(
    const Tensor& grad, const Tensor& x, const Tensor& squeezed, const Tensor& gates, const Tensor& mean, const Tensor& var,
    const MaybeTensor& bn_weight, const MaybeTensor& bn_bias, double eps, const Tensor& conv_h_weight, const Tensor& conv_w_weight,
    int64_t activation, bool skip) {
  BackwardArgs args(joined_call(x, squeezed, activation, skip, eps));
  const Shape& s = args.shape;
  check_like(grad, x, "grad");
  Parameters params(x);
  args.params.bn_weight = params.vector(bn_weight, s.m, "bn_weight");
  args.params.bn_bias = params.numbers(bn_bias, s.m, "bn_bias");
  args.params.conv_h_weight = params.matrix(conv_h_weight, s.c, s.m, "conv_h_weight");
  args.params.conv_w_weight = params.matrix(conv_w_weight, s.c, s.m, "conv_w_weight");
  args.saved.squeezed = saved_data(squeezed, x, s.rows() * s.m, "squeezed");
  args.saved.gates = saved_data(gates, x, s.rows() * s.c, "gates");
  args.saved.mean = saved_data(mean, x, s.m, "mean");
  args.saved.var = saved_data(var, x, s.m, "var");
  Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.grad = map_of(g, args.nhwc);
  ScalarType acc = acc_of(x);
  Tensor dlogits = empty2(x, s.rows(), s.c, acc), du = empty2(x, s.rows(), s.m, acc), y = empty2(x, s.rows(), s.m, acc);
  Tensor sums = empty1(x, 2 * s.m, ScalarType::Double);
  backward_local(args, {dlogits.mutable_data_ptr(), du.mutable_data_ptr(), y.mutable_data_ptr()}, (double*)sums.mutable_data_ptr(),
                 threads());
  return {dlogits, du, y, sums};
}

GradientTensors attend_backward_joined(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& squeezed,
                                       const Tensor& gates, const Tensor& mean, const Tensor& var, const Tensor& conv1_weight,
                                       const MaybeTensor& bn_weight, double eps, const Tensor& conv_h_weight,
                                       const Tensor& conv_w_weight, bool skip, const Tensor& moments, const Tensor& dlogits,
                                       const Tensor& du, const Tensor& y, const Tensor& sums, const Tensor& all_sums,
                                       int64_t needs) {
  BackwardArgs args(joined_call(x, squeezed, 0, skip, eps));
  const Shape& s = args.shape;
  check_like(grad, x, "grad");
  Parameters params(x);
  args.params.conv1_weight = params.matrix(conv1_weight, s.m, s.c, "conv1_weight");
  args.params.bn_weight = params.vector(bn_weight, s.m, "bn_weight");
  args.params.conv_h_weight = params.matrix(conv_h_weight, s.c, s.m, "conv_h_weight");
  args.params.conv_w_weight = params.matrix(conv_w_weight, s.c, s.m, "conv_w_weight");
  args.saved = {saved_data(pooled, x, s.rows() * s.c, "pooled"), saved_data(squeezed, x, s.rows() * s.m, "squeezed"),
                saved_data(gates, x, s.rows() * s.c, "gates"), saved_data(mean, x, s.m, "mean"), saved_data(var, x, s.m, "var")};
  MixGradients of = {saved_data(dlogits, x, s.rows() * s.c, "dlogits"), saved_data(du, x, s.rows() * s.m, "du"),
                     saved_data(y, x, s.rows() * s.m, "y")};
  check_device(sums, x, "sums");
  CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() && sums.numel() == 2 * s.m, "sums must be [2 * M] in float64");
  const double* all_moments = joined_data(moments, x, 1 + 2 * s.m, "moments");
  const double* all = joined_data(all_sums, x, 2 * s.m, "all_sums");
  double rows = 0;
  for (int64_t p = 0; p < moments.size(0); ++p) rows += all_moments[p * (1 + 2 * s.m)];
  Tensor in = native(x, args.nhwc), g = native(grad, args.nhwc);
  args.x = map_of(in, args.nhwc);
  args.grad = map_of(g, args.nhwc);
  MadeGradients made(args, x, &Cpu::empty_map, needs, conv1_weight, bn_weight, conv_h_weight, conv_w_weight);
  if (x.numel()) backward_joined(args, of, (const double*)data_of(sums, "sums"), all, all_sums.size(0), (int64_t)rows, threads());
  else made.zero();
  return made.all();
}

}  // namespace

#define BEFORE_SCHEMA "Tensor? before_weight, Tensor? before_bias, Tensor? before_mean, Tensor? before_var, float before_eps, "

COORDATT_REGISTER(more_definitions, nullptr, m) {
  m.def("norm_attend(Tensor x, " BEFORE_SCHEMA "int before_activation, " PARAMETER_SCHEMA "int activation, bool skip) -> Tensor");
  m.def("norm_attend_train(Tensor x, " BEFORE_SCHEMA "int before_norm, int before_activation, " PARAMETER_SCHEMA
        "int norm, int activation, bool skip) -> (Tensor out, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, "
        "Tensor var, Tensor batch_mean, Tensor batch_var)");
  m.def("norm_attend_backward(Tensor grad, Tensor x, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var, "
        "Tensor before_mean, Tensor before_var, Tensor? before_weight, Tensor? before_bias, float before_eps, int before_norm, "
        "int before_activation, Tensor conv1_weight, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor conv_h_weight, "
        "Tensor conv_w_weight, int norm, int activation, bool skip, int needs) -> (Tensor dx, Tensor dconv1_weight, "
        "Tensor dconv1_bias, Tensor dbn_weight, Tensor dbn_bias, Tensor dconv_h_weight, Tensor dconv_h_bias, "
        "Tensor dconv_w_weight, Tensor dconv_w_bias, Tensor dbefore_weight, Tensor dbefore_bias)");
  m.def("attend_train_local(Tensor x, Tensor conv1_weight, Tensor? conv1_bias) -> "
        "(Tensor pooled, Tensor squeezed, Tensor moments)");
  m.def("attend_train_joined(Tensor x, Tensor squeezed, Tensor moments, Tensor? bn_weight, Tensor? bn_bias, float eps, "
        "Tensor conv_h_weight, Tensor? conv_h_bias, Tensor conv_w_weight, Tensor? conv_w_bias, int activation, bool skip, "
        "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum) -> "
        "(Tensor out, Tensor gates, Tensor mean, Tensor var)");
  m.def("attend_backward_local(Tensor grad, Tensor x, Tensor squeezed, Tensor gates, Tensor mean, Tensor var, "
        "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor conv_h_weight, Tensor conv_w_weight, int activation, "
        "bool skip) -> (Tensor dlogits, Tensor du, Tensor y, Tensor sums)");
  m.def("attend_backward_joined(Tensor grad, Tensor x, Tensor pooled, Tensor squeezed, Tensor gates, Tensor mean, Tensor var, "
        "Tensor conv1_weight, Tensor? bn_weight, float eps, Tensor conv_h_weight, Tensor conv_w_weight, bool skip, "
        "Tensor moments, Tensor dlogits, Tensor(a!) du, Tensor y, Tensor sums, Tensor all_sums, int needs) -> (Tensor dx, "
        "Tensor dconv1_weight, Tensor dconv1_bias, Tensor dbn_weight, Tensor dbn_bias, Tensor dconv_h_weight, "
        "Tensor dconv_h_bias, Tensor dconv_w_weight, Tensor dconv_w_bias)");
}

COORDATT_REGISTER(implementations, "CPU", m) {
  COORDATT_IMPLEMENT(m, Cpu);
  m.impl("norm_attend", TORCH_BOX(&norm_attend));
  m.impl("norm_attend_train", TORCH_BOX(&norm_attend_train));
  m.impl("norm_attend_backward", TORCH_BOX(&norm_attend_backward));
  m.impl("attend_train_local", TORCH_BOX(&attend_train_local));
  m.impl("attend_train_joined", TORCH_BOX(&attend_train_joined));
  m.impl("attend_backward_local", TORCH_BOX(&attend_backward_local));
  m.impl("attend_backward_joined", TORCH_BOX(&attend_backward_joined));
}

}  // namespace bindings
}  // namespace coordatt
