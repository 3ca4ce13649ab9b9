// How maps come into shared memory: a ring of stages, filled ahead of the walk over a group's pieces. nchw pieces are one
// run of memory, brought by bulk copies where the device has them; everything else by the threads' own 16-byte copies,
// or element by element where pixels are not aligned.
#pragma once

#include "common.cuh"

namespace coordatt {
namespace cuda {

// The 16-byte aligned window around a run of elements; the run starts shift bytes into it. Copying whole windows serves
// runs of any alignment: the bytes beside the run lie in the same 16 bytes, so in the same allocation.
struct Window {
  const char* begin;
  int shift, bytes;
};

template <class T> __device__ __forceinline__ Window window_of(const T* first, int count) {
  Window v;
  v.shift = (int)((uintptr_t)first & 15);
  v.begin = (const char*)first - v.shift;
  v.bytes = (v.shift + count * (int)sizeof(T) + 15) & ~15;
  return v;
}

// SOURCES maps of the same shape, side by side in each stage.
template <class T, bool NHWC, int SOURCES> struct Stream {
  const Geometry& g;
  Place place;
  View<const T> source[SOURCES];
  char* ring;
  Barrier* barriers;
  int pieces;

  // Elements of the group's first channel on, in the image of the block.
  __device__ __forceinline__ const T* first_of(int s, const Piece& p) const {
    const T* image = source[s].data + (int64_t)place.n * source[s].image;
    if (NHWC) return image + (int64_t)p.row * g.w * source[s].pixel + place.c0;
    return image + (int64_t)(place.c0 + p.c) * (g.h * g.w) + p.row * g.w;
  }

  static __device__ __forceinline__ bool bulk() { return !NHWC && bulk_copies(); }

  __device__ __forceinline__ int turn(int k) const { return g.by_stages(k); }  // of the ring
  __device__ __forceinline__ int slot(int k) const { return k - turn(k) * g.stages; }

  __device__ __forceinline__ char* stage(int s, int k) const {
    return ring + (int64_t)(slot(k) * SOURCES + s) * g.stage_bytes;
  }

  // By all threads: starts bringing piece k into its stage.
  __device__ __forceinline__ void fill(int k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    Barrier* b = barriers + slot(k);
    if (NHWC) {
      for (int s = 0; s < SOURCES; ++s) fill_pixels(s, k, p);
      if (g.copies) copy_arrive(b);
      else barrier_arrive(b);
      return;
    }
    Window v[SOURCES];
    for (int s = 0; s < SOURCES; ++s) v[s] = window_of(first_of(s, p), p.channels * p.rows * g.w);
    if (bulk()) {
      if (threadIdx.x) return;
      int bytes = 0;
      for (int s = 0; s < SOURCES; ++s) bytes += v[s].bytes;
      barrier_expect(b, bytes);
      for (int s = 0; s < SOURCES; ++s) bulk_copy(stage(s, k), v[s].begin, v[s].bytes, b);
    } else {
      for (int s = 0; s < SOURCES; ++s)
        for (int i = threadIdx.x; i < v[s].bytes / 16; i += blockDim.x) copy16(stage(s, k) + i * 16, v[s].begin + i * 16);
      copy_arrive(b);
    }
  }

  __device__ __forceinline__ void fill_pixels(int s, int k, const Piece& p) {
    const T* from = first_of(s, p);
    T* to = (T*)stage(s, k);
    if (g.copies) {
      constexpr int per = Pack<T>::size;
      int count = p.rows * g.w * g.copies;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int pixel = g.by_copies(i), c = (i - pixel * g.copies) * per;
        if (c < p.channels) copy16(to + pixel * g.group + c, from + pixel * source[s].pixel + c);
      }
    } else {
      int count = p.rows * g.w * g.group;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        int pixel = g.by_group(i), c = i - pixel * g.group;
        if (c < p.channels) to[i] = from[pixel * source[s].pixel + c];
      }
    }
  }

  // By all threads, once: starts bringing as many pieces as there are stages.
  __device__ __forceinline__ void start() {
    pieces = pieces_of<NHWC>(g, place.channels);
    if (threadIdx.x == 0) {
      for (int k = 0; k < g.stages; ++k) barrier_init(barriers + k, bulk() ? 1 : blockDim.x);
      barrier_init_fence();
    }
    __syncthreads();
    for (int k = 0; k < min_of(g.stages, pieces); ++k) fill(k);
  }

  // Waits until piece k is there.
  __device__ __forceinline__ void wait(int k) { barrier_wait(barriers + slot(k), turn(k) & 1); }

  __device__ __forceinline__ const T* values(int s, int k, const Piece& p) const {
    int shift = NHWC ? 0 : (int)((uintptr_t)first_of(s, p) & 15);
    return (const T*)(stage(s, k) + shift);
  }

  // After the walk over piece k: its stage takes the piece a ring further on.
  __device__ __forceinline__ void advance(int k) {
    if (k + g.stages >= pieces) return;
    __syncthreads();
    fill(k + g.stages);
  }
};

}  // namespace cuda
}  // namespace coordatt
