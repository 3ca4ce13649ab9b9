// Sums along rows and columns of a piece in shared memory: pool's means, and what gate's backward pass adds up.
#pragma once

#include "common.cuh"

namespace coordatt {
namespace cuda {

// V numbers that are added up side by side: of neighbours in a row (nchw), or of one pixel's channels (nhwc).
template <int V, class A> struct Several {
  A v[V];
  __device__ __forceinline__ Several operator+(const Several& other) const {
    Several sum;
#pragma unroll
    for (int j = 0; j < V; ++j) sum.v[j] = v[j] + other.v[j];
    return sum;
  }
};

template <int V, class T> __device__ __forceinline__ Several<V, Acc<T>> several(const T* from) {
  struct alignas(V * sizeof(T)) Loaded { T v[V]; };
  Loaded loaded = *(const Loaded*)from;
  Several<V, Acc<T>> values;
#pragma unroll
  for (int j = 0; j < V; ++j) values.v[j] = widen(loaded.v[j]);
  return values;
}

// Whether a piece of half types can be read two at a time.
template <bool NHWC, class T> __device__ __forceinline__ bool in_pairs(const Geometry& g, const T* piece) {
  return sizeof(T) == 2 && (NHWC ? g.vectors : g.w % 2 == 0 && ((uintptr_t)piece & 3) == 0);
}

// Four partial sums: shorter chains of rounding, and loads that do not wait for one another.
template <int V, class A, class F> __device__ __forceinline__ Several<V, A> sum_of(int first, int count, int step, F value) {
  Several<V, A> a{}, b{}, c{}, d{};
  int i = first;
#pragma unroll 1  // four are on their way at a time; more would cost registers
  for (; i + 3 * step < count; i += 4 * step) {
    a = a + value(i);
    b = b + value(i + step);
    c = c + value(i + 2 * step);
    d = d + value(i + 3 * step);
  }
  if (i < count) a = a + value(i);
  if (i + step < count) b = b + value(i + step);
  if (i + 2 * step < count) c = c + value(i + 2 * step);
  return (a + b) + (c + d);
}

// Sums along the rows and down the columns of a piece: along(c, h, w, e) and down(c, h, w, e) are the V numbers from there
// on, e the element within the piece; row(c, h, sum) is called when a row is complete, column(c, w, sum) once per piece.
template <bool NHWC, int V, class A, class VR, class R, class VC, class C>
__device__ __forceinline__ void sum_lines(const Geometry& g, const Piece& p, VR along, R row, VC down, C column) {
  if (NHWC) {
    for (int i = threadIdx.x * V; i < p.rows * g.group; i += blockDim.x * V) {
      int r = g.by_group(i), c = i - r * g.group;
      if (c >= p.channels) continue;
      auto sums = sum_of<V, A>(0, g.w, 1, [&](int w) { return along(c, p.row + r, w, (r * g.w + w) * g.group + c); });
#pragma unroll
      for (int j = 0; j < V; ++j) row(c + j, p.row + r, sums.v[j]);
    }
    for (int i = threadIdx.x * V; i < g.w * g.group; i += blockDim.x * V) {
      int w = g.by_group(i), c = i - w * g.group;
      if (c >= p.channels) continue;
      auto sums = sum_of<V, A>(0, p.rows, 1, [&](int r) { return down(c, p.row + r, w, (r * g.w + w) * g.group + c); });
#pragma unroll
      for (int j = 0; j < V; ++j) column(c + j, w, sums.v[j]);
    }
    return;
  }
  int bits = V == 1 ? g.lane_bits : g.lane_bits - 1, lanes = 1 << bits, lane = threadIdx.x & (lanes - 1);
  int rows = p.channels * p.rows, step = blockDim.x >> bits;
  for (int base = 0; base < rows; base += step) {  // every lane takes part in the shuffles
    int i = base + (threadIdx.x >> bits), c = g.by_rows(i), h = p.row + i - c * p.rows;
    Several<V, A> sums{};
    if (i < rows)
      sums = sum_of<V, A>(lane * V, g.w, lanes * V, [&](int w) { return along(p.c + c, h, w, i * g.w + w); });
    A sum = V == 1 ? sums.v[0] : sums.v[0] + sums.v[V - 1];
    for (int mask = lanes >> 1; mask; mask >>= 1) sum += __shfl_xor_sync(all_lanes, sum, mask);
    if (i < rows && lane == 0) row(p.c + c, h, sum);
  }
  for (int i = threadIdx.x * V; i < p.channels * g.w; i += blockDim.x * V) {
    int c = g.by_w(i), w = i - c * g.w;
    auto sums = sum_of<V, A>(0, p.rows, 1, [&](int r) { return down(p.c + c, p.row + r, w, (c * p.rows + r) * g.w + w); });
#pragma unroll
    for (int j = 0; j < V; ++j) column(p.c + c, w + j, sums.v[j]);
  }
}

template <bool NHWC, int V, class T>
__device__ __forceinline__ void pool_values(const Geometry& g, const Piece& p, const T* x, Acc<T>* means) {
  using A = Acc<T>;
  bool last = p.row + p.rows == g.h;
  auto values = [&](int, int, int, int e) { return several<V>(x + e); };
  sum_lines<NHWC, V, A>(
      g, p, values, [&](int c, int h, A sum) { means[row_spot<NHWC>(g, c, h)] = sum / (A)g.w; }, values,
      [&](int c, int w, A sum) {
        A& mean = means[column_spot<NHWC>(g, c, w)];
        A total = p.row ? mean + sum : sum;
        mean = last ? total / (A)g.h : total;
      });
}

// The piece's part of the group's means.
template <bool NHWC, class T>
__device__ __forceinline__ void pool_piece(const Geometry& g, const Piece& p, const T* x, Acc<T>* means) {
  if (in_pairs<NHWC>(g, x)) pool_values<NHWC, 2>(g, p, x, means);
  else pool_values<NHWC, 1>(g, p, x, means);
}

// The piece's part of the gradients before the sigmoids, from grad * x.
template <bool NHWC, int V, class T>
__device__ __forceinline__ void reduce_values(const Geometry& g, const Piece& p, const T* grad, const T* x, const Acc<T>* gates,
                                              Acc<T>* ds) {
  using A = Acc<T>;
  bool last = p.row + p.rows == g.h;
  auto products = [&](int e, auto gate) {
    auto values = several<V>(grad + e), others = several<V>(x + e);
#pragma unroll
    for (int j = 0; j < V; ++j) values.v[j] = values.v[j] * others.v[j] * gate(j);
    return values;
  };
  sum_lines<NHWC, V, A>(
      g, p,
      [&](int c, int, int w, int e) {
        return products(e, [&](int j) { return gates[NHWC ? column_spot<NHWC>(g, c + j, w) : column_spot<NHWC>(g, c, w + j)]; });
      },
      [&](int c, int h, A sum) {
        int spot = row_spot<NHWC>(g, c, h);
        ds[spot] = gates[spot] * (A(1) - gates[spot]) * sum;
      },
      [&](int c, int h, int, int e) {
        return products(e, [&](int j) { return gates[row_spot<NHWC>(g, NHWC ? c + j : c, h)]; });
      },
      [&](int c, int w, A sum) {
        int spot = column_spot<NHWC>(g, c, w);
        A total = p.row ? ds[spot] + sum : sum;
        ds[spot] = last ? gates[spot] * (A(1) - gates[spot]) * total : total;
      });
}

template <bool NHWC, class T>
__device__ __forceinline__ void reduce_piece(const Geometry& g, const Piece& p, const T* grad, const T* x, const Acc<T>* gates,
                                             Acc<T>* ds) {
  if (in_pairs<NHWC>(g, grad) && in_pairs<NHWC>(g, x)) reduce_values<NHWC, 2>(g, p, grad, x, gates, ds);
  else reduce_values<NHWC, 1>(g, p, grad, x, gates, ds);
}

}  // namespace cuda
}  // namespace coordatt
