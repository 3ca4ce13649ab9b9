// The CUDA backend's operators: what bindings.h leaves to a backend, and the passes alone. Compiled with COORDATT_ON_CPU
// they take CPU tensors, for the emulator of tests/cuda_on_cpu.
#include "bindings.h"

#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.h"

#ifdef COORDATT_ON_CPU
namespace emulator {
void finish();
int device_index();
}
#else
// In torch's CUDA library only: null beside a torch built for CPUs, where no CUDA tensor can reach it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace coordatt {
namespace bindings {
namespace {

#ifdef COORDATT_ON_CPU
struct Here {
  cuda::Run run{emulator::device_index(), nullptr, nullptr, 0};
  explicit Here(const Tensor&) {}
};
#else
// x's device as the current one, and its stream.
struct Here {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Run run;
  explicit Here(const Tensor& x) : guard(x.get_device_index()), run{x.get_device_index(), nullptr, nullptr, 0} {
    CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(run.device, &run.stream));
  }
};
#endif

void check(const char* problem) {
  CHECK(!problem, "CUDA: ", problem ? problem : "");
#ifdef COORDATT_ON_CPU
  emulator::finish();
#endif
}

void check_map_fits(const Call& call) {
  CHECK(call.shape.h > 0 && call.shape.w > 0, "H and W must be at least 1");
  const char* why = cuda::obstacle(call);
  CHECK(!why, "x is too long: ", why ? why : "");
}

struct Cuda {
  // Unlike on the CPU an image's planes lie one after the other.
  static bool is_native(const Tensor& t, bool nhwc) {
    return has_dense_planes(t, nhwc) && (nhwc || t.size(1) <= 1 || t.stride(1) == t.size(2) * t.size(3));
  }

  static Tensor empty_map(const Tensor& like, bool nhwc) {
    MapStrides strides(like, nhwc);
    const int64_t* of = strides.of;
    return empty_strided(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, {of[0], of[1], of[2], of[3]},
                         like.scalar_type());
  }

  static void forward(const ForwardArgs& args, const RunningStatistics& running, const Tensor& x) {
    check_map_fits(args);
    Here here(x);
    const Shape& s = args.shape;
    if (s.n * s.c == 0) {
      if (running.mean || running.var || running.tracked)
        check(cuda::update_running_stats(running, args, nullptr, nullptr, 0, here.run));
      return;
    }
    here.run.workspace_bytes = cuda::workspace_bytes(args, here.run);
    Tensor space = empty1(x, (int64_t)here.run.workspace_bytes, ScalarType::Byte);
    here.run.workspace = space.mutable_data_ptr();
    check(cuda::forward(args, running, here.run));
  }

  static void backward(const BackwardArgs& args, const Tensor& x) {
    check_map_fits(args);
    Here here(x);
    here.run.workspace_bytes = cuda::workspace_bytes(args, here.run);
    Tensor space = empty1(x, (int64_t)here.run.workspace_bytes, ScalarType::Byte);
    here.run.workspace = space.mutable_data_ptr();
    check(cuda::backward(args, here.run));
  }

  static void update(const RunningStatistics& running, const Tensor& mean, const Tensor& var, int64_t rows) {
    Here here(mean);
    Call call;
    call.dtype = dtype_of(mean, "mean");
    for (const Param* p : {&running.mean, &running.var})
      if (*p && p->dtype != DType::f32) call.dtype = p->dtype;
    call.shape.m = mean.numel();
    check(cuda::update_running_stats(running, call, mean.mutable_data_ptr(), var.mutable_data_ptr(), rows, here.run));
  }
};

Tensor native(const Tensor& t, bool nhwc) { return Fused<Cuda>::native(t, nhwc); }

cuda::OutsideLines lines_of(const Tensor& t, int line_dim, const char* name) {
  return {data_of(t, name), dtype_of(t, name), t.stride(0), t.stride(1), t.stride(line_dim)};
}

// [N, C, H + W, 1], rows then columns.
cuda::OutsideMiddle both_of(const Tensor& t, int64_t h) {
  cuda::OutsideMiddle m{lines_of(t, 2, "grad"), lines_of(t, 2, "grad")};
  m.w.data = (char*)m.w.data + h * t.stride(2) * (int64_t)t.element_size();
  return m;
}

Tensor pool(const Tensor& x) {
  Call call = call_of(x, 0, 0, false);
  check_map_fits(call);
  const Shape& s = call.shape;
  Tensor in = native(x, call.nhwc);
  Tensor out = empty_strided(x, {s.n, s.c, s.length(), 1}, {s.length() * s.c, 1, s.c, s.c}, x.scalar_type());
  Here here(x);
  if (x.numel()) check(cuda::pool(call, map_of(in, call.nhwc), both_of(out, s.h), here.run));
  return out;
}

Tensor pool_backward(const Tensor& grad, const Tensor& x) {
  Call call = call_of(x, 0, 0, false);
  check_map_fits(call);
  const Shape& s = call.shape;
  CHECK(grad.dim() == 4 && grad.size(0) == s.n && grad.size(1) == s.c && grad.size(2) == s.length() && grad.size(3) == 1,
        "grad must be [N, C, H + W, 1]");
  check_device(grad, x, "grad");
  Tensor dx = Cuda::empty_map(x, call.nhwc);
  Here here(x);
  if (x.numel()) check(cuda::pool_backward(call, both_of(grad, s.h), map_of(dx, call.nhwc), here.run));
  return dx;
}

Tensor gate(const Tensor& x, const Tensor& s_h, const Tensor& s_w, bool skip) {
  Call call = call_of(x, 0, 0, skip);
  check_map_fits(call);
  check_logits(call.shape, x, s_h, s_w);
  Tensor in = native(x, call.nhwc), out = Cuda::empty_map(x, makes_nhwc(x, skip));
  Here here(x);
  cuda::OutsideMiddle logits{lines_of(s_h, 2, "s_h"), lines_of(s_w, 3, "s_w")};
  if (x.numel()) check(cuda::gate(call, map_of(in, call.nhwc), logits, map_of(out, call.nhwc), here.run));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gate_backward(const Tensor& grad, const Tensor& x, const Tensor& s_h, const Tensor& s_w,
                                                 bool skip) {
  Call call = call_of(x, 0, 0, skip);
  check_map_fits(call);
  check_like(grad, x, "grad");
  check_logits(call.shape, x, s_h, s_w);
  const Shape& s = call.shape;
  Tensor in = native(x, call.nhwc), g = native(grad, call.nhwc), dx = Cuda::empty_map(x, call.nhwc);
  Tensor ds_h = empty_strided(x, {s.n, s.c, s.h, 1}, {s.h * s.c, 1, s.c, s.c}, s_h.scalar_type());
  Tensor ds_w = empty_strided(x, {s.n, s.c, 1, s.w}, {s.w * s.c, 1, s.w * s.c, s.c}, s_w.scalar_type());
  Here here(x);
  cuda::OutsideMiddle logits{lines_of(s_h, 2, "s_h"), lines_of(s_w, 3, "s_w")};
  cuda::OutsideMiddle dlogits{lines_of(ds_h, 2, "s_h"), lines_of(ds_w, 3, "s_w")};
  if (x.numel())
    check(cuda::gate_backward(call, map_of(g, call.nhwc), map_of(in, call.nhwc), logits, map_of(dx, call.nhwc), dlogits, here.run));
  return {dx, ds_h, ds_w};
}

// Calls f with what a call's forward pass on x would be given.
template <class F> void with_forward(const Tensor& x, int64_t mid, bool training, F f) {
  ForwardArgs args(call_of(x, training ? 2 : 1, 0, false));
  check_map_fits(args);
  args.shape.m = mid;
  Tensor in = native(x, args.nhwc);
  args.x = map_of(in, args.nhwc);
  if (training) args.saved.gates = in.mutable_data_ptr();
  Here here(x);
  f(args, here.run);
}

std::string forward_way(const Tensor& x, int64_t mid, bool training) {
  std::string way;
  with_forward(x, mid, training, [&](const ForwardArgs& args, const cuda::Run& run) { way = cuda::way_of(args, run); });
  return way;
}

// JSON.
std::string forward_outline(const Tensor& x, int64_t mid, bool training) {
  cuda::Outline o{};
  with_forward(x, mid, training, [&](const ForwardArgs& args, const cuda::Run& run) { check(cuda::outline_of(args, run, o)); });
  std::string text = "{\"way\": \"" + forward_way(x, mid, training) + "\"";
  auto add = [&](const char* name, int value) { text += std::string(", \"") + name + "\": " + std::to_string(value); };
  add("blocks", o.blocks);
  add("cluster", o.cluster);
  add("shared", o.shared);
  add("group", o.group);
  add("groups", o.groups);
  add("stages", o.stages);
  add("held", o.held);
  add("processors", o.processors);
  add("shared_per_processor", o.shared_per_processor);
  return text + "}";
}

}  // namespace

#ifdef COORDATT_ON_CPU
STABLE_TORCH_LIBRARY(coordatt_fast_cuda_on_cpu, m) {
  define_operators(m);
  m.def("cuda_forward_way(Tensor x, int mid, bool training) -> str");
  m.def("cuda_forward_outline(Tensor x, int mid, bool training) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(coordatt_fast_cuda_on_cpu, CPU, m) {
#else
COORDATT_REGISTER(implementations, "CUDA", m) {
#endif
  COORDATT_IMPLEMENT(m, Cuda);
  m.impl("cuda_forward_way", TORCH_BOX(&forward_way));
  m.impl("cuda_forward_outline", TORCH_BOX(&forward_outline));
}

}  // namespace bindings
}  // namespace coordatt
