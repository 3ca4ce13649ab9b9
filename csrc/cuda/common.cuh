// What the kernels share: types, how an image is cut into groups of channels and pieces, small helpers.
#pragma once

#include <stdint.h>

#include "coordatt.h"
#include "passes.h"
#include "ptx.cuh"

namespace coordatt {
namespace cuda {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }

// The type that T is added up in.
template <class T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class T> using Acc = typename AccOf<T>::type;

// Blocks of a pass to an SM that the compiler must leave registers for, without a spill.
template <class T> constexpr int least_blocks = sizeof(T) == 8 ? 1 : blocks_per_processor;

// As many as one 16-byte access takes.
template <class T> struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T v[size];
};

__device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }

template <class T> __device__ __forceinline__ bool aligned16(const T* p) { return ((uintptr_t)p & 15) == 0; }

// A parameter of type T, or wide: of T's accumulate type. False where it is absent.
template <class T> struct Weight {
  const void* data;
  bool wide;
  __device__ __forceinline__ Weight(const Param& p) : data(p.data), wide(p.dtype == DType::f32 || p.dtype == DType::f64) {}
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
  __device__ __forceinline__ Acc<T> operator[](int64_t i) const {
    return wide ? ((const Acc<T>*)data)[i] : (Acc<T>)widen(((const T*)data)[i]);
  }
};

// Writes one number of a parameter's gradient, or of a running statistic.
template <class T> __device__ __forceinline__ void set(const Param& p, int64_t i, Acc<T> v) {
  if (p.dtype == DType::f32 || p.dtype == DType::f64) ((Acc<T>*)p.data)[i] = v;
  else narrow(v, ((T*)p.data)[i]);
}

// Numbers kept in the accumulate type, as a parameter.
template <class A> __device__ __forceinline__ Param wide(void* data) {
  return {data, sizeof(A) == 8 ? DType::f64 : DType::f32};
}

template <class A> __device__ __forceinline__ A load_line(const OutsideLines& s, int n, int c, int l) {
  int64_t i = n * s.image + c * s.channel + l * s.line;
  switch (s.dtype) {
    case DType::f64: return (A)((const double*)s.data)[i];
    case DType::bf16: return (A)widen(((const bf16*)s.data)[i]);
    case DType::f16: return (A)widen(((const half*)s.data)[i]);
    default: return (A)((const float*)s.data)[i];
  }
}
template <class A> __device__ __forceinline__ void store_line(const OutsideLines& s, int n, int c, int l, A v) {
  int64_t i = n * s.image + c * s.channel + l * s.line;
  switch (s.dtype) {
    case DType::f64: ((double*)s.data)[i] = (double)v; break;
    case DType::bf16: narrow((float)v, ((bf16*)s.data)[i]); break;
    case DType::f16: narrow((float)v, ((half*)s.data)[i]); break;
    default: ((float*)s.data)[i] = (float)v;
  }
}

// A full-size tensor as the kernels walk it: elements between images, and between pixels (nhwc).
template <class T> struct View {
  T* data;
  int64_t image;
  int64_t pixel;
  __device__ __forceinline__ View(const Map& m) : data((T*)m.data), image(m.image), pixel(m.step) {}
};

// This block's image and channels.
struct Place {
  int n, group, c0, channels;
};

__device__ __forceinline__ Place place_of(const Geometry& g, int block) {
  Place p;
  p.n = block / g.groups;
  p.group = block - p.n * g.groups;
  p.c0 = p.group * g.group;
  p.channels = max_of(0, min_of(g.group, g.c - p.c0));
  return p;
}

// Whole rows of some channels of a group: what one stage of shared memory holds.
struct Piece {
  int c, channels, row, rows;
};

template <bool NHWC> __device__ __forceinline__ int pieces_of(const Geometry& g, int channels) {
  return NHWC ? g.down : (channels + g.piece_channels - 1) / g.piece_channels * g.down;
}

template <bool NHWC> __device__ __forceinline__ Piece piece_of(const Geometry& g, int channels, int k) {
  int along = NHWC ? 0 : g.by_down(k);
  Piece p;
  p.c = NHWC ? 0 : along * g.piece_channels;
  p.channels = NHWC ? channels : min_of(g.piece_channels, channels - p.c);
  p.row = (k - along * g.down) * g.piece_rows;
  p.rows = min_of(g.piece_rows, g.h - p.row);
  return p;
}

// Where the number of a channel's row or column stands in an array of the group's lines in shared memory.
template <bool NHWC> __device__ __forceinline__ int row_spot(const Geometry& g, int c, int h) {
  return NHWC ? h * g.pitch + c : c * g.pitch + h;
}
template <bool NHWC> __device__ __forceinline__ int column_spot(const Geometry& g, int c, int w) {
  return NHWC ? (g.h + w) * g.pitch + c : c * g.pitch + g.column + w;
}
template <bool NHWC> __device__ __forceinline__ int line_spot(const Geometry& g, int c, int l) {
  return l < g.h ? row_spot<NHWC>(g, c, l) : column_spot<NHWC>(g, c, l - g.h);
}

// Copies a group's lines between shared memory and [N, C, L].
template <bool NHWC, class A>
__device__ __forceinline__ void load_lines(const Geometry& g, const Place& p, const A* from, A* lines) {
  from += ((int64_t)p.n * g.c + p.c0) * g.l;
  for (int i = threadIdx.x; i < p.channels * g.l; i += blockDim.x) {
    int c = g.by_l(i);
    lines[line_spot<NHWC>(g, c, i - c * g.l)] = from[i];
  }
}
template <bool NHWC, class A>
__device__ __forceinline__ void store_lines(const Geometry& g, const Place& p, const A* lines, A* to) {
  to += ((int64_t)p.n * g.c + p.c0) * g.l;
  for (int i = threadIdx.x; i < p.channels * g.l; i += blockDim.x) {
    int c = g.by_l(i);
    to[i] = lines[line_spot<NHWC>(g, c, i - c * g.l)];
  }
}

// A group's lines between shared memory and the tensors of other modules.
template <bool NHWC, class A, class F>
__device__ __forceinline__ void read_lines(const Geometry& g, const Place& p, const OutsideMiddle& from, A* lines, F finish) {
  for (int i = threadIdx.x; i < g.group * g.l; i += blockDim.x) {
    int l = g.by_group(i), c = i - l * g.group;
    if (c >= p.channels) continue;
    A v = l < g.h ? load_line<A>(from.h, p.n, p.c0 + c, l) : load_line<A>(from.w, p.n, p.c0 + c, l - g.h);
    lines[line_spot<NHWC>(g, c, l)] = finish(l, v);
  }
}
template <bool NHWC, class A>
__device__ __forceinline__ void write_lines(const Geometry& g, const Place& p, const A* lines, const OutsideMiddle& to) {
  for (int i = threadIdx.x; i < g.group * g.l; i += blockDim.x) {
    int l = g.by_group(i), c = i - l * g.group;
    if (c >= p.channels) continue;
    A v = lines[line_spot<NHWC>(g, c, l)];
    if (l < g.h) store_line(to.h, p.n, p.c0 + c, l, v);
    else store_line(to.w, p.n, p.c0 + c, l - g.h, v);
  }
}

constexpr unsigned all_lanes = 0xffffffffu;

// The sum over the block, in every thread. scratch: 33 numbers of shared memory, used by one sum after another.
template <class A> __device__ __forceinline__ A block_sum(A v, A* scratch) {
  for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(all_lanes, v, mask);
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = lane < warps ? scratch[lane] : A(0);
    for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(all_lanes, v, mask);
    if (lane == 0) scratch[32] = v;
  }
  __syncthreads();
  return scratch[32];
}

// The parts of a block's shared memory (geometry.h's Room): barriers, arrays of lines, a chunk of the middle, the ring.
template <class A> struct Shared {
  const Room& room;
  char* base;
  int arrays;
  __device__ __forceinline__ Shared(const Room& r, int count) : room(r), base(shared_memory()), arrays(count) {}
  __device__ __forceinline__ Barrier* barriers() const { return (Barrier*)base; }
  __device__ __forceinline__ A* lines(int i) const { return (A*)(base + room.barriers + i * room.lines); }
  __device__ __forceinline__ A* chunk() const { return lines(arrays); }
  __device__ __forceinline__ char* ring() const { return (char*)chunk() + room.chunk; }
};

}  // namespace cuda
}  // namespace coordatt
