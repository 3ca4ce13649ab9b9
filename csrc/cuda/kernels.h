// The CUDA backend as its bindings see it: torch-free, every call asynchronous on a stream.
#pragma once

#include <stddef.h>

#include "coordatt.h"

namespace coordatt {
namespace cuda {

// Where a call runs. workspace: workspace_bytes of device memory, any contents, for the length of the call's kernels.
struct Run {
  int device;
  void* stream;
  void* workspace;
  size_t workspace_bytes;
};

// Lines of the middle from outside the package, [N, C, lines]: element n * image + c * channel + l * line.
struct OutsideLines {
  void* data;
  DType dtype;
  int64_t image, channel, line;
};
struct OutsideMiddle {
  OutsideLines h, w;
};

// Throw nothing; null, or what went wrong, from CUDA.
const char* forward(const ForwardArgs&, const RunningStatistics&, const Run&);
const char* backward(const BackwardArgs&, const Run&);
const char* update_running_stats(const RunningStatistics&, const Call&, const void* mean, const void* var, int64_t rows,
                                 const Run&);

// The passes alone: means of x; dx of means' gradients; out of x and logits; dx and logits' gradients.
const char* pool(const Call&, const Map& x, const OutsideMiddle& means, const Run&);
const char* pool_backward(const Call&, const OutsideMiddle& means, const Map& dx, const Run&);
const char* gate(const Call&, const Map& x, const OutsideMiddle& logits, const Map& out, const Run&);
const char* gate_backward(const Call&, const Map& grad, const Map& x, const OutsideMiddle& logits, const Map& dx,
                          const OutsideMiddle& dlogits, const Run&);

size_t workspace_bytes(const ForwardArgs&, const Run&);
size_t workspace_bytes(const BackwardArgs&, const Run&);

// Null, or why maps of this kind are left to others.
const char* obstacle(const Call&);

// How inference and training go forward. "chain": separate passes. "cluster:K" (inference): one launch over clusters of K
// blocks. "resident" (training): one cooperative launch. A way that a map does not fit gives way to the chain. "any": of all
// ways, the one that is estimated the fastest; "": the same among those that verified.h has for the device. False: no such way.
bool set_forward(const char* way);

// The way that this call would go; saved.gates not null: in training.
const char* way_of(const ForwardArgs&, const Run&);

// How it is cut up. held: clusters, or blocks of resident training, that the device holds at a time; 0 for a chain.
struct Outline {
  int blocks, cluster, shared;  // of the launch, or of the chain's first
  int group, groups, stages, held, processors, shared_per_processor;
};
const char* outline_of(const ForwardArgs&, const Run&, Outline&);

}  // namespace cuda
}  // namespace coordatt
