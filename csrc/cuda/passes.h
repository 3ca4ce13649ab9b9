// One struct per kernel launch, passed to the kernel as it is, and the launchers. Null data: not there, not wanted.
#pragma once

#include "geometry.h"
#include "kernels.h"

namespace coordatt {
namespace cuda {

// What every pass over a map says.
struct Pass : Call {
  Geometry geometry;
  Room room;
};

template <class P> P pass_of(const Call& call, const Cut& cut) {
  P p{};
  (Call&)p = call;
  p.geometry = cut.geometry;
  p.room = cut.room;
  return p;
}

// x -> means [N, C, L] and the groups' parts of the squeezed middle, partial [N, groups, M, L].
struct PoolPass : Pass {
  Map x;
  void* means;
  void* partial;
  OutsideMiddle outside;  // means, in place of both
};

// The squeezed middle [N, M, L] from its parts, its statistics, the running ones. A block for each row m.
struct StatisticsPass : Call {
  Geometry geometry;
  const void* partial;
  Saved saved;
  RunningStatistics running;
};

// x -> out, with gates from one of: partial; saved.squeezed with saved.mean and saved.var; logits.
struct GatePass : Pass {
  Map x, out;
  const void* partial;
  Saved saved;  // gates: written
  OutsideMiddle logits;
  int64_t* tracked;  // counted up
};

// grad, x -> logits' gradients ds [N, C, L] and the groups' parts of y's gradient, partial [N, groups, M, L].
struct ReducePass : Pass {
  Map grad, x;
  const void* gates;
  void* ds;
  void* partial;
  OutsideMiddle logits, dlogits;  // in place of gates and ds, then with
  Map dx;
};

// y [N, M, L], the gradient of the squeezed middle dz [N, M, L], those of its normalisation's parameters.
struct RowsPass : Call {
  Geometry geometry;
  const void* partial;
  Saved saved;
  void *y, *dz;
  Gradients out;
};

// grad, dz -> dx; and in further blocks ds, y, means, dz -> the gradients of the convolutions' parameters.
struct SpreadPass : Pass {
  Map grad, dx;
  Saved saved;
  const void *ds, *y, *dz;
  OutsideMiddle means;  // their gradients, in place of grad, gates and dz
  Gradients out;
  int weight_blocks;
  Divider by_h;
};

// x -> out in one launch: inference over clusters; training over a cooperative grid, with what StatisticsPass takes.
struct OnePass : Pass {
  Map x, out;
  void* partial;
  Saved saved;
  RunningStatistics running;
};

// The running statistics alone.
struct UpdatePass {
  DType dtype;
  int m;
  int64_t rows;
  RunningStatistics running;
  const void *mean, *var;
};

struct Launch {
  int blocks, threads, shared;
  int cluster = 1;
  bool dependent = false;    // may start while the kernel before is running: it calls grid_dependency_wait
  bool cooperative = false;  // all blocks at a time: it calls grid_sync
};

const char* launch(const PoolPass&, const Run&);
const char* launch(const StatisticsPass&, const Run&);
const char* launch(const GatePass&, const Run&);
const char* launch(const ReducePass&, const Run&);
const char* launch(const RowsPass&, const Run&);
const char* launch(const SpreadPass&, const Run&);
const char* launch(const UpdatePass&, const Run&);
const char* launch_one_pass(const OnePass&, int cluster, int clusters, int shared, const Run&);
const char* launch_resident_training(const OnePass&, int shared, const Run&);

// How many clusters of that shape, or blocks of resident training, the device holds at a time; 0 if none.
int clusters_held(const OnePass&, int cluster, int shared, const Run&);
int training_blocks_held(const OnePass&, int shared, const Run&);

// Null, or what is wrong; filled from CUDA once per device.
const char* device_of(const Run&, const Device*&);

}  // namespace cuda
}  // namespace coordatt
