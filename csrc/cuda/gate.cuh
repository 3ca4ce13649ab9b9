// Gate: a piece's elements with what their row and column say, from shared memory to global.
#pragma once

#include "common.cuh"

namespace coordatt {
namespace cuda {

template <int COUNT, class A> __device__ __forceinline__ void load_vector(const A* from, A (&to)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += Pack<A>::size) *(Pack<A>*)(to + i) = *(const Pack<A>*)(from + i);
}

// For functions that take one number from each row and from each column.
template <class A> struct OneNumber {
  const A* numbers;
  using Line = A;
  __device__ __forceinline__ Line line(int spot) const { return numbers[spot]; }
  template <int COUNT> __device__ __forceinline__ void lines(int spot, Line (&to)[COUNT]) const {
    alignas(16) A v[COUNT];
    load_vector<COUNT>(numbers + spot, v);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = v[i];
  }
};

// The gates alone: out = x * a_w * a_h (+ x).
template <class A> struct Gating : OneNumber<A> {
  bool skip;
  static constexpr bool reads = true;
  __device__ __forceinline__ A operator()(A x, A row, A column) const {
    A out = x * column * row;
    return skip ? out + x : out;
  }
};

// dx = g * a_w * a_h (+ g) + what the means pass back.
template <class A> struct Spreading {
  const A* gates;
  const A* means;  // their gradients, over W and H already
  bool skip;
  static constexpr bool reads = true;
  struct Line { A gate, mean; };
  __device__ __forceinline__ Line line(int spot) const { return {gates[spot], means[spot]}; }
  template <int COUNT> __device__ __forceinline__ void lines(int spot, Line (&to)[COUNT]) const {
    alignas(16) A v[COUNT], d[COUNT];
    load_vector<COUNT>(gates + spot, v);
    load_vector<COUNT>(means + spot, d);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = {v[i], d[i]};
  }
  __device__ __forceinline__ A operator()(A x, Line row, Line column) const {
    A out = x * column.gate * row.gate;
    return (skip ? out + x : out) + (row.mean + column.mean);
  }
};

// The means' part of dx alone.
template <class A> struct Means : OneNumber<A> {
  static constexpr bool reads = false;
  __device__ __forceinline__ A operator()(A, A row, A column) const { return row + column; }
};

// out = f(in) for a piece; in is the piece in shared memory, not looked at where F reads nothing.
template <class T, class F>
__device__ __forceinline__ void apply_planes(const Geometry& g, const Piece& p, const T* in, T* out, const F& f) {
  using A = Acc<T>;
  using Line = typename F::Line;
  constexpr int V = Pack<T>::size;
  int count = p.channels * p.rows * g.w;
  int head = (int)(-(intptr_t)out & 15) / (int)sizeof(T);  // elements before the first aligned vector
  bool whole = !F::reads || (((uintptr_t)in ^ (uintptr_t)out) & 15) == 0;
  bool in_line = g.vectors && whole && head == 0;
  int first = head ? head - V : 0, vectors = (count - first + V - 1) / V;
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    int e = first + i * V, start = max_of(e, 0), q = g.by_w(start), w = start - q * g.w;
    int c = g.by_rows(q), r = q - c * p.rows, line = row_spot<false>(g, p.c + c, p.row + r);
    int spot = column_spot<false>(g, p.c + c, w);
    // One line further down, which may be the next channel's first.
    auto next = [&] {
      ++line;
      if (++r < p.rows) return;
      r = 0;
      line += g.pitch - p.rows;
      spot += g.pitch;
    };
    if (e < 0 || e + V > count) {  // the run's ends
      for (int at = start; at < min_of(e + V, count); ++at) {
        T v{};
        if (F::reads) v = in[at];
        narrow(f((A)widen(v), f.line(line), f.line(spot)), out[at]);
        ++spot;
        if (++w == g.w) {
          w = 0;
          spot -= g.w;
          next();
        }
      }
      continue;
    }
    Pack<T> v;
    if (F::reads) {
      if (whole) {
        v = *(const Pack<T>*)(in + e);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) v.v[j] = in[e + j];
      }
    }
    Line row = f.line(line);
    if (in_line) {
      Line columns[V];
      f.template lines<V>(spot, columns);
#pragma unroll
      for (int j = 0; j < V; ++j) narrow(f((A)widen(v.v[j]), row, columns[j]), v.v[j]);
    } else if (g.w >= V) {  // at most one line ends within the vector
      int left = g.w - w, before = spot;
      if (left < V) next();
      Line row_after = f.line(line);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        bool after = j >= left;
        narrow(f((A)widen(v.v[j]), after ? row_after : row, f.line((after ? spot - g.w : before) + j)), v.v[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        narrow(f((A)widen(v.v[j]), row, f.line(spot)), v.v[j]);
        ++spot;
        if (++w == g.w && j + 1 < V) {
          w = 0;
          spot -= g.w;
          next();
          row = f.line(line);
        }
      }
    }
    *(Pack<T>*)(out + e) = v;
  }
}

// The same where channels are dense; pixel: of out. V channels at a time, 1 where they are not aligned.
template <int V, class T, class F>
__device__ __forceinline__ void apply_pixels(const Geometry& g, const Piece& p, const T* in, T* out, int64_t pixel, const F& f) {
  int across = V == 1 ? g.group : g.group / V, count = p.rows * g.w * across;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    int q = V == 1 ? g.by_group(i) : g.by_vectors(i), c = (i - q * across) * V;
    if (c >= p.channels) continue;
    int r = g.by_w(q), w = q - r * g.w;
    typename F::Line rows[V], columns[V];
    if (V == 1) {
      rows[0] = f.line(row_spot<true>(g, c, p.row + r));
      columns[0] = f.line(column_spot<true>(g, c, w));
      T v{};
      if (F::reads) v = in[q * g.group + c];
      narrow(f((Acc<T>)widen(v), rows[0], columns[0]), out[q * pixel + c]);
    } else {
      f.template lines<V>(row_spot<true>(g, c, p.row + r), rows);
      f.template lines<V>(column_spot<true>(g, c, w), columns);
      Pack<T> v;
      if (F::reads) v = *(const Pack<T>*)(in + q * g.group + c);
#pragma unroll
      for (int j = 0; j < V; ++j) narrow(f((Acc<T>)widen(v.v[j]), rows[j], columns[j]), v.v[j]);
      *(Pack<T>*)(out + q * pixel + c) = v;
    }
  }
}

template <bool NHWC, class T, class F>
__device__ __forceinline__ void apply_piece(const Geometry& g, const Place& place, const Piece& p, const T* in,
                                            const View<T>& out, const F& f) {
  T* image = out.data + (int64_t)place.n * out.image;
  if (!NHWC) {
    apply_planes(g, p, in, image + (int64_t)(place.c0 + p.c) * (g.h * g.w) + p.row * g.w, f);
    return;
  }
  image += (int64_t)p.row * g.w * out.pixel + place.c0;
  constexpr int V = Pack<T>::size;
  if (g.vectors && aligned16(image) && out.pixel % V == 0) apply_pixels<V>(g, p, in, image, out.pixel, f);
  else apply_pixels<1>(g, p, in, image, out.pixel, f);
}

}  // namespace cuda
}  // namespace coordatt
