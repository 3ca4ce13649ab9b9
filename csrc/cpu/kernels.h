// The kernels one SIMD level provides, and what they take. A kernel works on one image and a range of channels, or on
// a block of rows of the middle; it never allocates, never starts threads, and its arithmetic for an element does not
// depend on the range it was given, so any split over threads gives the same bits.
#pragma once

#include <stdint.h>

#include "coordatt.h"

namespace coordatt {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Rows of the middle that belong to one image: h rows, then w rows, ld elements apart, channels dense.
struct AxisRows {
  void* h = nullptr;
  void* w = nullptr;
  int64_t ld = 0;
};

// How a map is read: as it is, or as act(scale x + shift), whose activation cuts off (none, relu, relu6) or is curved.
enum Read : int { as_is = 0, bounded = 1, curved = 2 };
constexpr int reads = 3;

// A channel's numbers of what stands before the block, [C] each, padded to whole vectors.
struct BeforeArgs {
  const void *scale = nullptr, *shift = nullptr;
  int activation = no_activation;
  // Backward, with du the gradient of scale x + shift: dx = scale * du - offset - (x - mean) * slope, or scale * du where
  // offset is null.
  const void *mean = nullptr, *offset = nullptr, *slope = nullptr;
};

// Pool, gate and their backward passes, and those of the normalisation before them: one image, channels [c0, c1).
struct PlaneArgs {
  int64_t h, w, c0, c1;
  int64_t full_h;             // of the image: h is less for a piece of its rows, which the pointers start at
  const void* x = nullptr;
  const void* grad = nullptr;
  void* out = nullptr;
  int64_t x_step = 0, grad_step = 0, out_step = 0;  // as Map::step
  AxisRows pooled;   // pool: written; spread: read (their gradients)
  AxisRows gates;    // read
  AxisRows dlogits;  // gate_reduce: written
  BeforeArgs before;
  double *sum = nullptr, *square = nullptr;  // moments, before_sums: [C] each, of this image
  bool skip = false;
  void* scratch = nullptr;  // MapKernels::plane_scratch bytes
};

// Out[r, m] = sum over c of a[r, c] * b[m, c] (+ bias[m]); r in [0, rows), m in [0, cols), c in [0, depth).
struct DotArgs {
  const void* a; int64_t lda;
  const void* b; int64_t ldb;
  const void* bias;  // or null
  void* out; int64_t ldo;
  int64_t rows, cols, depth;
};

// Out[i, c] (+)= sum over k of a[i * a_row + k * a_depth] * b[k, c] (+ bias[c]), then the sigmoid if asked; c in [c0, c1).
struct AxpyArgs {
  const void* a; int64_t a_row, a_depth;
  const void* b; int64_t ldb;
  const void* bias;  // or null
  void* out; int64_t ldo;
  int64_t rows, depth, c0, c1;
  bool sigmoid, accumulate;
};

// y = activation(u), u = scale * (z - mean) + shift, over [rows, M]; backward also takes dy and gives du and BN's sums.
struct ActArgs {
  const void* z;
  const void* scale; const void* shift; const void* mean;  // [M]
  void* y;
  void* dy;                              // backward: in dy, out du
  double* sum_du; double* sum_du_dev;    // backward: [M] each, added to: sums of du and of du * (z - mean)
  int64_t rows, m;
  Activation activation;
  void* scratch;                         // act_scratch_bytes(m)
};

// Batch statistics of z [rows, M]: mean and biased variance, summed in double; as sums, where moments is not null.
// Backward through the normalisation: du -> dz = scale * (du - offset - (z - mean) * slope), in place; offset and slope null:
// scale * du, also where z is not finite.
struct NormArgs {
  const void* z;
  void* mean; void* var;  // stats: written; backward: mean read
  double* moments;        // stats: [2, M] means and sums of squared deviations, written in place of mean and var
  void* du;               // backward
  const void* scale; const void* offset; const void* slope;  // backward: [M]
  int64_t rows, m;
};

// What depends on the stored type.
struct MapKernels {
  void (*pool[reads][2])(const PlaneArgs&);         // x -> pooled; [0] nchw, [1] nhwc
  void (*gate[reads][2])(const PlaneArgs&);         // x, gates -> out
  void (*gate_reduce[reads][2])(const PlaneArgs&);  // grad, x, gates -> dlogits
  void (*spread[2])(const PlaneArgs&);              // grad, gates, pooled -> out (dx); grad null: only the pooling's part
  void (*moments[2])(const PlaneArgs&);             // x -> a channel's mean, and sum of squared deviations from it
  // With dv what spread gives and du = dv times the activation's slope, of Read bounded and curved:
  void (*before_sums[reads][2])(const PlaneArgs&);    // grad, x, gates, pooled -> sums of du and of du * (x - mean)
  void (*before_spread[reads][2])(const PlaneArgs&);  // grad, x, gates, pooled -> out (dx)
  int64_t (*plane_scratch)(int64_t h, int64_t w, int64_t c);
  void (*to_acc)(const void* from, void* to, int64_t count);
  void (*from_acc)(const void* from, void* to, int64_t count);
};

// What depends on the accumulate type.
struct MixKernels {
  void (*dot)(const DotArgs&);
  void (*axpy)(const AxpyArgs&);
  void (*act)(const ActArgs&);
  void (*act_backward)(const ActArgs&);
  void (*stats)(const NormArgs&);
  void (*norm_backward)(const NormArgs&);
  void (*sigmoid)(void* data, int64_t count);
  void (*sum_rows)(const void* a, int64_t lda, int64_t rows, int64_t c0, int64_t c1, void* out);  // out[c] = sum over rows
  void (*transpose)(const void* a, int64_t lda, int64_t rows, int64_t cols, void* out, int64_t ldo);  // out[c, r] = a[r, c]
};

struct Kernels {
  const char* level;
  MapKernels map[4];   // by DType
  MixKernels mix[2];   // float, double
};

constexpr int64_t max_lanes = 16;
inline int64_t padded(int64_t a) { return (a + max_lanes - 1) / max_lanes * max_lanes; }

inline int64_t act_scratch_bytes(int64_t m) { return 5 * m * max_lanes * 8; }

#define COORDATT_DECLARE_LEVEL(level)                     \
  namespace level {                                       \
  void add_pool(Kernels&);                                \
  void add_mix(Kernels&);                                 \
  void add_norm(Kernels&);                                \
  void add_gate(Kernels&);                                \
  }
COORDATT_DECLARE_LEVEL(baseline)
COORDATT_DECLARE_LEVEL(avx2)
COORDATT_DECLARE_LEVEL(avx512)
COORDATT_DECLARE_LEVEL(avx512_bf16)
COORDATT_DECLARE_LEVEL(neon)

// dispatch.cpp: the level in use; set_level("") is automatic and returns null, or says why a level cannot be had.
const Kernels& kernels();
const char* set_level(const char* name);
const char* compiled_levels();

// Forward and backward of a whole call (forward.cpp, backward.cpp), and the two passes alone.
void forward(const ForwardArgs&, const Threads&);
void backward(const BackwardArgs&, const Threads&);

// The same under batch statistics of several processes' maps, in two halves each: between them every process gives what
// the first half made (moments, sums) to all, in the order of their ranks.
// moments: [1 + 2M] rows R, then per channel mean and sum of squared deviations. saved.pooled and saved.squeezed are written.
void forward_local(const ForwardArgs&, double* moments, const Threads&);
// moments: [processes, 1 + 2M]. saved.gates, saved.mean, saved.var and out are written. Returns the rows of all.
int64_t forward_joined(const ForwardArgs&, const double* moments, int64_t processes, const Threads&);
// sums: [2M] of du and of du * (z - mean).
void backward_local(const BackwardArgs&, const MixGradients&, double* sums, const Threads&);
// sums: this process's; all_sums: [processes, 2M]; rows: of all. mix.du becomes dz.
void backward_joined(const BackwardArgs&, const MixGradients&, const double* sums, const double* all_sums, int64_t processes,
                     int64_t rows, const Threads&);
void pool(const PoolArgs&, const Threads&);
void pool_backward(const PoolArgs&, const Threads&);
void gate(const GateArgs&, const Threads&);
void gate_backward(const GateArgs&, const Threads&);

}  // namespace coordatt
