// Mix: the channel-mixing middle of a block. Means -> squeezed -> gates, and the same products backward.
#pragma once

#include "common.cuh"

namespace coordatt {
namespace cuda {

template <class A> __device__ __forceinline__ A exponential(A v);
template <> __device__ __forceinline__ float exponential(float v) { return expf(v); }
template <> __device__ __forceinline__ double exponential(double v) { return exp(v); }

template <class A> __device__ __forceinline__ A sigmoid(A v) { return A(1) / (A(1) + exponential(-v)); }

// min(max(v, 0), 6), NaN kept.
template <class A> __device__ __forceinline__ A clamp6(A v) {
  v = v < A(0) ? A(0) : v;
  return v > A(6) ? A(6) : v;
}

// NaN kept, and infinite u gives what PyTorch's kernels give.
template <class A> __device__ __forceinline__ A activate(Activation f, A u) {
  switch (f) {
    case Activation::hard_swish: return u * (clamp6(u + A(3)) / A(6));
    case Activation::silu: return u * sigmoid(u);
    case Activation::relu: return u < A(0) ? A(0) : u;
    case Activation::relu6: return clamp6(u);
  }
  static_assert(activations == 4, "a case for each");
  __builtin_unreachable();
}

// Where the slope is zero by a comparison the result is selected, as in PyTorch's kernels: NaN or infinity times zero
// would be NaN.
template <class A> __device__ __forceinline__ A activate_backward(Activation f, A u, A dy) {
  switch (f) {
    case Activation::hard_swish: {
      A slope = u >= A(3) ? A(0) : u / A(6), du = dy * (slope + clamp6(u + A(3)) / A(6));
      return u <= A(-3) ? A(0) : du;
    }
    case Activation::silu: {
      A s = sigmoid(u);
      return dy * (s * (A(1) + u * (A(1) - s)));
    }
    case Activation::relu: return u <= A(0) ? A(0) : dy;
    case Activation::relu6: return u <= A(0) || u >= A(6) ? A(0) : dy;
  }
  static_assert(activations == 4, "a case for each");
  __builtin_unreachable();
}

// u = (z - mean) * scale + shift of one row of the middle.
template <class A> struct Affine {
  A mean, inverse, scale, shift;
  __device__ __forceinline__ A operator()(A z) const { return (z - mean) * scale + shift; }
};

template <class T> __device__ __forceinline__ Affine<Acc<T>> affine(const Call& call, int m, const Param& mean, const Param& var) {
  using A = Acc<T>;
  if (call.norm == Norm::none) return {A(0), A(1), A(1), A(0)};
  const Params& p = call.params;
  Affine<A> f;
  f.mean = Weight<T>(mean)[m];
  f.inverse = A(1) / sqrt(Weight<T>(var)[m] + (A)p.eps);
  f.scale = p.bn_weight ? f.inverse * Weight<T>(p.bn_weight)[m] : f.inverse;
  f.shift = p.bn_bias ? Weight<T>(p.bn_bias)[m] : A(0);
  return f;
}

// Weights of a 1x1 convolution as (channel, m): element channel * by_channel + m * by_m.
template <class T> struct Matrix {
  Weight<T> weight;
  int by_channel, by_m;
  __device__ __forceinline__ Acc<T> operator()(int c, int m) const {
    return weight[(int64_t)c * by_channel + (int64_t)m * by_m];
  }
};

// One step of sum_each: lanes that differ in the bit 2 * HALF exchange halves of v[0 .. 2 * HALF - 1] and add.
template <int HALF, class A> __device__ __forceinline__ void fold(A (&v)[16], int lane) {
  bool upper = lane & (2 * HALF);
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    A send = upper ? v[i] : v[i + HALF], keep = upper ? v[i + HALF] : v[i];
    v[i] = keep + __shfl_xor_sync(all_lanes, send, 2 * HALF);
  }
}

// The 16 sums over a warp of v[0 .. 15]: lane i has that of v[i / 2].
template <class A> __device__ __forceinline__ A sum_each(A (&v)[16], int lane) {
  fold<8>(v, lane);
  fold<4>(v, lane);
  fold<2>(v, lane);
  fold<1>(v, lane);
  return v[0] + __shfl_xor_sync(all_lanes, v[0], 1);
}

// out[m * out_pitch + l] = sum over this group's channels of weight(c, m) * lines(c, l), for lines [0, count) that stand
// line_step apart from lines on. Lanes run over channels; a warp makes 4 x 4 results at a time.
template <class T, class A>
__device__ __forceinline__ void contract(const A* lines, int channel_step, int line_step, int count, const Matrix<T>& weight,
                                         const Place& p, int m_count, A* out, int out_pitch) {
  int lane = threadIdx.x & 31, across = (count + 3) / 4, tiles = (m_count + 3) / 4 * across;
  for (int tile = threadIdx.x >> 5; tile < tiles; tile += blockDim.x >> 5) {
    int m0 = tile / across * 4, l0 = (tile % across) * 4;
    A sums[16] = {};
#pragma unroll 2  // four, the compiler's choice, spill
    for (int c = lane; c < p.channels; c += 32) {
      A w[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = weight(p.c0 + c, min_of(m0 + i, m_count - 1));
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = lines[c * channel_step + min_of(l0 + j, count - 1) * line_step];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i * 4 + j] += w[i] * v[j];
    }
    A sum = sum_each(sums, lane);
    int m = m0 + (lane >> 3), l = l0 + (lane >> 1 & 3);
    if (!(lane & 1) && m < m_count && l < count) out[m * out_pitch + l] = sum;
  }
}

// Both halves: the rows with one convolution, the columns with another (or the same).
template <bool NHWC, class T, class A>
__device__ __forceinline__ void contract_lines(const Geometry& g, const A* lines, const Matrix<T>& rows,
                                               const Matrix<T>& columns, const Place& p, A* out) {
  int channel_step = NHWC ? 1 : g.pitch, line_step = NHWC ? g.pitch : 1;
  contract(lines + row_spot<NHWC>(g, 0, 0), channel_step, line_step, g.h, rows, p, g.m, out, g.l);
  contract(lines + column_spot<NHWC>(g, 0, 0), channel_step, line_step, g.w, columns, p, g.m, out + g.h, g.l);
}

// lines(c, first + l) = finish(c, l, sum over m of weight(c, m) * y[m * g.chunk + l]) for this group's channels, l in
// [0, count). Each thread makes 4 lines of one channel.
template <class T, class A, class F>
__device__ __forceinline__ void expand(const Geometry& g, const A* y, int count, const Matrix<T>& weight, const Place& p,
                                       A* lines, int channel_step, int line_step, F finish) {
  int items = g.group * ((count + 3) / 4);
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    int quad = g.by_group(i), l0 = quad * 4, c = i - quad * g.group;
    if (c >= p.channels) continue;
    A sums[4] = {};
#pragma unroll 4
    for (int m = 0; m < g.m; ++m) {
      A w = weight(p.c0 + c, m);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] += w * y[m * g.chunk + min_of(l0 + j, count - 1)];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (l0 + j < count) lines[c * channel_step + (l0 + j) * line_step] = finish(c, sums[j]);
  }
}

// Lines [l0, l0 + count) of a group, from y [M, count] with pitch g.chunk: rows and columns each with its convolution
// and its finish.
template <bool NHWC, class T, class A, class FR, class FC>
__device__ __forceinline__ void expand_lines(const Geometry& g, const A* y, int l0, int count, const Matrix<T>& rows,
                                             const Matrix<T>& columns, const Place& p, A* lines, FR finish_row,
                                             FC finish_column) {
  int channel_step = NHWC ? 1 : g.pitch, line_step = NHWC ? g.pitch : 1;
  int split = min_of(max_of(g.h - l0, 0), count);
  if (split > 0)
    expand(g, y, split, rows, p, lines + row_spot<NHWC>(g, 0, l0), channel_step, line_step, finish_row);
  if (split < count)
    expand(g, y + split, count - split, columns, p, lines + column_spot<NHWC>(g, 0, l0 + split - g.h), channel_step, line_step,
           finish_column);
}

// A group's gates from lines [l0, l0 + count) of y.
template <bool NHWC, class T, class A>
__device__ __forceinline__ void gates_from(const Geometry& g, const Params& params, const A* y, int l0, int count,
                                           const Place& p, A* gates) {
  auto open = [&](const Param& bias) {
    return [&, bias = Weight<T>(bias)](int c, A s) { return sigmoid(bias ? s + bias[p.c0 + c] : s); };
  };
  expand_lines<NHWC>(g, y, l0, count, Matrix<T>{params.conv_h_weight, g.m, 1}, Matrix<T>{params.conv_w_weight, g.m, 1}, p,
                     gates, open(params.conv_h_bias), open(params.conv_w_bias));
}

// The sum over an image's groups of partial [N, groups, M, L], in order.
template <class A> __device__ __forceinline__ A sum_partials(const Geometry& g, const A* partial, int n, int m, int l) {
  const A* from = partial + ((int64_t)n * g.groups * g.m + m) * g.l + l;
  A sum = 0;
#pragma unroll 8
  for (int k = 0; k < g.groups; ++k) sum += from[(int64_t)k * g.m * g.l];
  return sum;
}

// Squeezed, normalised and activated lines of an image, chunk by chunk through shared memory: take(l0, count) is called by
// all threads when y [M, count], pitch g.chunk, is there.
template <class A, class Z, class U> __device__ __forceinline__ void for_chunks(const Geometry& g, A* y, Z value, U take) {
  for (int l0 = 0; l0 < g.l; l0 += g.chunk) {
    int count = min_of(g.chunk, g.l - l0);
    if (l0) __syncthreads();
    for (int i = threadIdx.x; i < g.m * count; i += blockDim.x) {
      int m = i / count, l = i - m * count;
      y[m * g.chunk + l] = value(m, l0 + l);
    }
    __syncthreads();
    take(l0, count);
  }
}

template <class T>
__device__ __forceinline__ void move_statistic(const Param& running, int64_t step, int m, Acc<T> factor, Acc<T> value) {
  if (running) set<T>(running, m * step, (Acc<T>(1) - factor) * Weight<T>(running)[m * step] + factor * value);
}

// The running statistics of row m, by one thread. rows: N * L > 0.
template <class T>
__device__ __forceinline__ void move_statistics(const RunningStatistics& r, int m, int64_t rows, Acc<T> mean, Acc<T> var) {
  using A = Acc<T>;
  A factor = r.cumulative ? A(1) / (A)(*r.tracked + 1) : (A)r.momentum;
  move_statistic<T>(r.mean, r.mean_step, m, factor, mean);
  move_statistic<T>(r.var, r.var_step, m, factor, rows > 1 ? var * ((A)rows / (A)(rows - 1)) : var);
}

// Row m of the squeezed middle from its partial sums, and its mean and biased variance over the batch. scratch: 33 numbers.
template <class T, class P>
__device__ __forceinline__ void statistics_of(const P& a, int m, Acc<T>* scratch) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  int rows = g.n * g.l;
  A *squeezed = (A*)a.saved.squeezed, *mean_out = (A*)a.saved.mean, *var_out = (A*)a.saved.var;
  Weight<T> conv1_bias(a.params.conv1_bias);
  A bias = conv1_bias ? conv1_bias[m] : A(0), sum = 0;
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    int n = g.by_l(r), l = r - n * g.l;
    A z = sum_partials(g, (const A*)a.partial, n, m, l) + bias;
    squeezed[((int64_t)n * g.m + m) * g.l + l] = z;
    sum += z;
  }
  if (a.norm != Norm::batch) {
    if (threadIdx.x == 0) {
      mean_out[m] = a.norm == Norm::none ? A(0) : Weight<T>(a.params.mean)[m];
      var_out[m] = a.norm == Norm::none ? A(1) : Weight<T>(a.params.var)[m];
    }
    return;
  }
  A mean = block_sum(sum, scratch) / (A)rows, off = 0, squares = 0;
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    int n = g.by_l(r), l = r - n * g.l;
    A d = squeezed[((int64_t)n * g.m + m) * g.l + l] - mean;
    off += d;
    squares += d * d;
  }
  off = block_sum(off, scratch) / (A)rows;  // the rounding of the first sum, taken out of mean and variance
  A var = block_sum(squares, scratch) / (A)rows - off * off;
  if (off == off) mean += off;
  if (threadIdx.x == 0) {
    mean_out[m] = mean;
    var_out[m] = var;
    move_statistics<T>(a.running, m, rows, mean, var);
  }
}

}  // namespace cuda
}  // namespace coordatt
