// Pool: row and column means of a piece in shared memory.
#pragma once

#include "common.cuh"

namespace coordatt {
namespace cuda {

// Four partial sums: shorter chains of rounding, and loads that do not wait for one another.
template <class A, class F> __device__ __forceinline__ A sum_of(int first, int count, int step, F value) {
  A a = 0, b = 0, c = 0, d = 0;
  int i = first;
  for (; i + 3 * step < count; i += 4 * step) {
    a += value(i);
    b += value(i + step);
    c += value(i + 2 * step);
    d += value(i + 3 * step);
  }
  for (; i < count; i += step) a += value(i);
  return (a + b) + (c + d);
}

// Sums along the rows and down the columns of a piece: along(c, h, w, e) and down(c, h, w, e) are what is added up, e the
// element within the piece; row(c, h, sum) is called when a row is complete, column(c, w, sum) once per piece.
template <bool NHWC, class A, class VR, class R, class VC, class C>
__device__ __forceinline__ void sum_lines(const Geometry& g, const Piece& p, VR along, R row, VC down, C column) {
  if (NHWC) {
    for (int i = threadIdx.x; i < p.rows * g.group; i += blockDim.x) {
      int r = g.by_group(i), c = i - r * g.group;
      if (c >= p.channels) continue;
      row(c, p.row + r, sum_of<A>(0, g.w, 1, [&](int w) { return along(c, p.row + r, w, (r * g.w + w) * g.group + c); }));
    }
    for (int i = threadIdx.x; i < g.w * g.group; i += blockDim.x) {
      int w = g.by_group(i), c = i - w * g.group;
      if (c >= p.channels) continue;
      column(c, w, sum_of<A>(0, p.rows, 1, [&](int r) { return down(c, p.row + r, w, (r * g.w + w) * g.group + c); }));
    }
    return;
  }
  int lane = threadIdx.x & (g.lanes - 1), rows = p.channels * p.rows, step = blockDim.x / g.lanes;
  for (int base = 0; base < rows; base += step) {  // every lane takes part in the shuffles
    int i = base + threadIdx.x / g.lanes, c = g.by_rows(i), h = p.row + i - c * p.rows;
    A sum = 0;
    if (i < rows) sum = sum_of<A>(lane, g.w, g.lanes, [&](int w) { return along(p.c + c, h, w, i * g.w + w); });
    for (int mask = g.lanes >> 1; mask; mask >>= 1) sum += __shfl_xor_sync(all_lanes, sum, mask);
    if (i < rows && lane == 0) row(p.c + c, h, sum);
  }
  for (int i = threadIdx.x; i < p.channels * g.w; i += blockDim.x) {
    int c = g.by_w(i), w = i - c * g.w;
    column(p.c + c, w, sum_of<A>(0, p.rows, 1, [&](int r) {
      return down(p.c + c, p.row + r, w, (c * p.rows + r) * g.w + w);
    }));
  }
}

// The piece's part of the group's means.
template <bool NHWC, class T>
__device__ __forceinline__ void pool_piece(const Geometry& g, const Piece& p, const T* x, Acc<T>* means) {
  using A = Acc<T>;
  bool last = p.row + p.rows == g.h;
  auto value = [&](int, int, int, int e) { return (A)widen(x[e]); };
  sum_lines<NHWC, A>(
      g, p, value, [&](int c, int h, A sum) { means[row_spot<NHWC>(g, c, h)] = sum / (A)g.w; }, value,
      [&](int c, int w, A sum) {
        A& mean = means[column_spot<NHWC>(g, c, w)];
        A total = p.row ? mean + sum : sum;
        mean = last ? total / (A)g.h : total;
      });
}

}  // namespace cuda
}  // namespace coordatt
