// What kernels take of a call's parameters: mix's, and those of what stands before the block.
#pragma once

#include "work.h"

namespace coordatt {

// The parameters in the accumulate type, prepared once per call from the caller's scratch.
struct Middle {
  void* conv1_weight;              // [M, C]
  void* conv1_bias;                // [M] or null
  void* scale; void* shift;        // [M] the normalisation as u = scale * (z - mean) + shift
  const void* mean;                // [M]
  void* conv_h; void* conv_w;      // [C, M]
  void* expand_h; void* expand_w;  // [M, C]: the same transposed, or null where they are transposed as they are used
  void* bias_h; void* bias_w;      // [C] or null
  static int64_t scratch_bytes(const Call&);
  // mean, var: in the accumulate type; null without normalisation or while they are not known.
  Middle(const Call&, const Kernels&, Scratch&, const void* mean, const void* var, bool transpose);
};

// What kernels take of Call::before, prepared once per call from the caller's scratch.
struct Ahead {
  Read read = as_is;
  BeforeArgs args;
  // mean, var: [C] in the accumulate type.
  static int64_t scratch_bytes(const Call&);
  Ahead() = default;
  Ahead(const Call&, const Kernels&, Scratch&, const void* mean, const void* var);
};

// scale = bn_weight / sqrt(var + eps), or bn_weight where var is null.
void fold_scale(const Call&, const Kernels&, const void* var, void* scale);

// Copies a parameter into the accumulate type.
void load_param(const Kernels&, DType acc, const Param&, int64_t count, void* to);

}  // namespace coordatt
