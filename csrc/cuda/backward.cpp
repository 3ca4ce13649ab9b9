// Backward of a whole call: gate, mix, pool in reverse.
#include "passes.h"

namespace coordatt {
namespace cuda {
namespace {

// Scratch: ds [N, C, L]; partial [N, groups, M, L]; y and dz [N, M, L].
struct Scratch {
  int64_t ds, partial, row;
  Scratch(const BackwardArgs& b, int groups) {
    const Shape& s = b.shape;
    int64_t acc = acc_bytes_of(b.dtype), lines = s.n * s.length();
    ds = round_up(lines * s.c * acc, 256);
    partial = round_up(lines * groups * s.m * acc, 256);
    row = round_up(lines * s.m * acc, 256);
  }
  int64_t total() const { return ds + partial + 2 * row; }
};

Cut reduce_cut(const BackwardArgs& b, const Device& device) {
  return stream_cut(b, aligned(b, b.x) && aligned(b, b.grad), device, 2, 2);
}

bool wants_weights(const Gradients& out) {
  return out.conv1_weight || out.conv_h_weight || out.conv_h_bias || out.conv_w_weight || out.conv_w_bias;
}

}  // namespace

size_t workspace_bytes(const BackwardArgs& b, const Run& run) {
  const Device* device;
  if (device_of(run, device)) return 0;
  Cut cut = reduce_cut(b, *device);
  return cut.shared ? (size_t)Scratch(b, cut.geometry.groups).total() : 0;
}

const char* backward(const BackwardArgs& b, const Run& run) {
  const Device* device;
  if (const char* why = device_of(run, device)) return why;
  Cut cut = reduce_cut(b, *device);
  if (!cut.shared) return too_long;
  Scratch sizes(b, cut.geometry.groups);
  char* ds = (char*)run.workspace;
  char *partial = ds + sizes.ds, *y = partial + sizes.partial, *dz = y + sizes.row;

  ReducePass reduce = pass_of<ReducePass>(b, cut);
  reduce.grad = b.grad;
  reduce.x = b.x;
  reduce.gates = b.saved.gates;
  reduce.ds = ds;
  reduce.partial = partial;
  if (const char* why = launch(reduce, run)) return why;

  RowsPass rows{};
  (Call&)rows = b;
  rows.geometry = cut.geometry;
  rows.partial = partial;
  rows.saved = b.saved;
  rows.y = y;
  rows.dz = dz;
  rows.out = b.out;
  if (const char* why = launch(rows, run)) return why;

  Cut spread_cut = stream_cut(b, aligned(b, b.grad), *device, 2, 1);
  if (!spread_cut.shared) return too_long;
  SpreadPass spread = pass_of<SpreadPass>(b, spread_cut);
  spread.grad = b.grad;
  spread.dx = b.out.dx;
  spread.saved = b.saved;
  spread.ds = ds;
  spread.y = y;
  spread.dz = dz;
  spread.out = b.out;
  spread.by_h = Divider(b.shape.h);
  int64_t jobs = 3 * ((b.shape.c + 3) / 4) * ((b.shape.m + 3) / 4), warps = threads_of_pass / 32;
  spread.weight_blocks = wants_weights(b.out) ? (int)((jobs + warps - 1) / warps) : 0;
  if (!spread.weight_blocks && !spread.dx.data) return nullptr;
  return launch(spread, run);
}

}  // namespace cuda
}  // namespace coordatt
