// The gradients of the convolutions' parameters: products over all rows or columns of the batch.
#pragma once

#include "mix.cuh"

namespace coordatt {
namespace cuda {

// A warp makes 4 channels x 4 rows m of one weight, lanes running over the lines of the batch; the warps of all blocks
// count through conv_h's, conv_w's and conv1's.
template <class T> __device__ __forceinline__ void weights_of(const SpreadPass& a, int block) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  int lane = threadIdx.x & 31, across = (g.m + 3) / 4, tiles = (g.c + 3) / 4 * across;
  int job = block * (blockDim.x >> 5) + (threadIdx.x >> 5), kind = job / tiles, tile = job - kind * tiles;
  if (kind > 2) return;
  const Param& weight = kind == 0 ? a.out.conv_h_weight : kind == 1 ? a.out.conv_w_weight : a.out.conv1_weight;
  const Param& bias = kind == 0 ? a.out.conv_h_bias : kind == 1 ? a.out.conv_w_bias : Param{};
  if (!weight && !bias) return;
  int c0 = tile / across * 4, m0 = (tile % across) * 4, span = kind == 0 ? g.h : kind == 1 ? g.w : g.l;
  const A* left = (const A*)(kind == 2 ? a.saved.pooled : a.ds) + (kind == 1 ? g.h : 0);
  const A* right = (const A*)(kind == 2 ? a.dz : a.y) + (kind == 1 ? g.h : 0);
  Divider by_span = kind == 0 ? a.by_h : kind == 1 ? g.by_w : g.by_l;
  int c_last = g.c - 1 - c0, m_last = g.m - 1 - m0;
  A sums[16] = {}, lefts[4] = {};
  for (int r = lane; r < g.n * span; r += 32) {
    int n = by_span(r), l = r - n * span;
    const A *us = left + ((int64_t)n * g.c + c0) * g.l + l, *vs = right + ((int64_t)n * g.m + m0) * g.l + l;
    A u[4], v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) u[i] = us[min_of(i, c_last) * g.l];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = vs[min_of(j, m_last) * g.l];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      lefts[i] += u[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i * 4 + j] += u[i] * v[j];
    }
  }
  A sum = sum_each(sums, lane);
  int c = c0 + (lane >> 3), m = m0 + (lane >> 1 & 3);
  if (weight && !(lane & 1) && c < g.c && m < g.m)
    set<T>(weight, kind == 2 ? (int64_t)m * g.c + c : (int64_t)c * g.m + m, sum);
  if (!bias || m0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    for (int mask = 16; mask; mask >>= 1) lefts[i] += __shfl_xor_sync(all_lanes, lefts[i], mask);
    if (lane == i && c0 + i < g.c) set<T>(bias, c0 + i, lefts[i]);
  }
}

}  // namespace cuda
}  // namespace coordatt
