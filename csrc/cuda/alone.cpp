// The pool and gate passes alone, for modules whose middle runs elsewhere.
#include "passes.h"

namespace coordatt {
namespace cuda {
namespace {

// A pass of call without a middle, cut for that many arrays of lines and maps read.
template <class P> const char* prepare(const Call& call, bool aligned, int arrays, int sources, const Run& run, P& pass) {
  const Device* device;
  if (const char* why = device_of(run, device)) return why;
  Call alone = call;
  alone.shape.m = 1;
  Cut cut = stream_cut(alone, aligned, *device, arrays, sources);
  pass = pass_of<P>(alone, cut);
  return cut.shared ? nullptr : too_long;
}

}  // namespace

const char* pool(const Call& call, const Map& x, const OutsideMiddle& means, const Run& run) {
  PoolPass a;
  if (const char* why = prepare(call, aligned(call, x), 1, 1, run, a)) return why;
  a.x = x;
  a.outside = means;
  return launch(a, run);
}

const char* pool_backward(const Call& call, const OutsideMiddle& means, const Map& dx, const Run& run) {
  SpreadPass a;
  if (const char* why = prepare(call, aligned(call, dx), 2, 1, run, a)) return why;
  a.dx = dx;
  a.means = means;
  return launch(a, run);
}

const char* gate(const Call& call, const Map& x, const OutsideMiddle& logits, const Map& out, const Run& run) {
  GatePass a;
  if (const char* why = prepare(call, aligned(call, x), 1, 1, run, a)) return why;
  a.x = x;
  a.out = out;
  a.logits = logits;
  return launch(a, run);
}

const char* gate_backward(const Call& call, const Map& grad, const Map& x, const OutsideMiddle& logits, const Map& dx,
                          const OutsideMiddle& dlogits, const Run& run) {
  ReducePass a;
  if (const char* why = prepare(call, aligned(call, x) && aligned(call, grad), 2, 2, run, a)) return why;
  a.grad = grad;
  a.x = x;
  a.logits = logits;
  a.dlogits = dlogits;
  a.dx = dx;
  return launch(a, run);
}

}  // namespace cuda
}  // namespace coordatt
