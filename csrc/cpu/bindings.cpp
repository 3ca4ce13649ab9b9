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
  const MapKernels& k = kernels().map[(int)running.dtype];
  int64_t size = running.dtype == DType::f64 ? 8 : running.dtype == DType::f32 ? 4 : 2;
  for (int64_t i = 0; i < count; ++i) {
    char* to = (char*)running.data + i * step * size;
    A v;
    k.to_acc(to, &v, 1);
    v = (A)((1 - momentum) * v + momentum * scale * batch[i]);
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
  PoolArgs args{};
  (Call&)args = call_of(x, 0, 0, false);
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
  int64_t n = t.size(0), c = t.size(1), length = t.size(length_dim), size = (int64_t)t.element_size(), bytes = wide ? 8 : 4;
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
  PoolArgs args{};
  (Call&)args = call_of(x, 0, 0, false);
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
  gather_rows(s_w, 3, acc, (char*)gates.mutable_data_ptr() + s.n * s.h * s.c * (acc == ScalarType::Double ? 8 : 4));
  kernels().mix[acc == ScalarType::Double].sigmoid(gates.mutable_data_ptr(), gates.numel());
  return gates;
}

Tensor gate(const Tensor& x, const Tensor& s_h, const Tensor& s_w, bool skip) {
  GateArgs args{};
  (Call&)args = call_of(x, 0, 0, skip);
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
  GateArgs args{};
  (Call&)args = call_of(x, 0, 0, skip);
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
  int64_t bytes = acc == ScalarType::Double ? 8 : 4;
  const Kernels& k = kernels();
  k.map[(int)dtype_of(s_h, "s_h")].from_acc(logits.mutable_data_ptr(), ds_h.mutable_data_ptr(), ds_h.numel());
  k.map[(int)dtype_of(s_w, "s_w")].from_acc((char*)logits.mutable_data_ptr() + s.n * s.h * s.c * bytes,
                                            ds_w.mutable_data_ptr(), ds_w.numel());
  return {dx, ds_h, ds_w};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(coordatt_fast, CPU, m) { COORDATT_IMPLEMENT(m, Cpu); }

}  // namespace bindings
}  // namespace coordatt
