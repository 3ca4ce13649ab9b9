// Pool forward: x -> means and the groups' parts of the squeezed middle. Backward: what the means pass back, into dx.
#include "pool.cuh"

#include "gate.cuh"
#include "launch.cuh"
#include "mix.cuh"
#include "stream.cuh"
#include "weights.cuh"

namespace coordatt {
namespace cuda {

template <class T, bool NHWC>
__global__ void __launch_bounds__(threads_of_pass, least_blocks<T>) pool_kernel(const __grid_constant__ PoolPass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  Shared<A> shared(a.room, 1);
  Place place = place_of(g, blockIdx.x);
  Stream<T, NHWC, 1> x{g, place, {View<const T>(a.x)}, shared.ring(), shared.barriers(), 0};
  A* means = shared.lines(0);
  x.start();
  for (int k = 0; k < x.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    x.wait(k);
    pool_piece<NHWC>(g, p, x.values(0, k, p), means);
    x.advance(k);
  }
  grid_dependency_launch();
  __syncthreads();
  if (a.outside.h.data) {
    write_lines<NHWC>(g, place, means, a.outside);
    return;
  }
  if (a.means) store_lines<NHWC>(g, place, means, (A*)a.means);
  Matrix<T> conv1{a.params.conv1_weight, 1, g.c};
  contract_lines<NHWC>(g, means, conv1, conv1, place, (A*)a.partial + (int64_t)blockIdx.x * g.m * g.l);
}

// The first blocks make the weights' gradients, the others dx.
template <class T, bool NHWC>
__global__ void __launch_bounds__(threads_of_pass, least_blocks<T>) spread_kernel(const __grid_constant__ SpreadPass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  if ((int)blockIdx.x < a.weight_blocks) {
    grid_dependency_wait();
    weights_of<T>(a, blockIdx.x);
    return;
  }
  Shared<A> shared(a.room, 2);
  Place place = place_of(g, gridDim.x - 1 - blockIdx.x);
  A *gates = shared.lines(0), *means = shared.lines(1);
  View<T> dx(a.dx);
  if (a.means.h.data) {
    read_lines<NHWC>(g, place, a.means, means, [&](int l, A v) { return v / (A)(l < g.h ? g.w : g.h); });
    __syncthreads();
    for (int k = 0; k < pieces_of<NHWC>(g, place.channels); ++k)
      apply_piece<NHWC>(g, place, piece_of<NHWC>(g, place.channels, k), (const T*)nullptr, dx, Means<A>{{means}});
    return;
  }
  Stream<T, NHWC, 1> grad{g, place, {View<const T>(a.grad)}, shared.ring(), shared.barriers(), 0};
  grad.start();
  load_lines<NHWC>(g, place, (const A*)a.saved.gates, gates);
  grid_dependency_wait();
  const A* dz = (const A*)a.dz + (int64_t)place.n * g.m * g.l;
  Matrix<T> conv1{a.params.conv1_weight, 1, g.c};
  A* chunk = shared.chunk();
  for_chunks(g, chunk, [&](int m, int l) { return dz[m * g.l + l]; }, [&](int l0, int count) {
    expand_lines<NHWC>(g, chunk, l0, count, conv1, conv1, place, means, [&](int, A v) { return v / (A)g.w; },
                       [&](int, A v) { return v / (A)g.h; });
  });
  __syncthreads();
  for (int k = 0; k < grad.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    grad.wait(k);
    apply_piece<NHWC>(g, place, p, grad.values(0, k, p), dx, Spreading<A>{gates, means, a.skip});
    grad.advance(k);
  }
}

const char* launch(const PoolPass& a, const Run& run) {
  return for_map(a, [&](auto t, auto nhwc) {
    const Geometry& g = a.geometry;
    Launch l{g.n * g.groups, threads_of_pass, a.room.total(1, 1)};
    return launch_kernel<pool_kernel<decltype(t), decltype(nhwc)::value>>(l, a, run);
  });
}

const char* launch(const SpreadPass& a, const Run& run) {
  return for_map(a, [&](auto t, auto nhwc) {
    const Geometry& g = a.geometry;
    Launch l{a.weight_blocks + (a.dx.data ? g.n * g.groups : 0), threads_of_pass, a.room.total(2, a.grad.data ? 1 : 0)};
    l.dependent = !a.means.h.data;
    return launch_kernel<spread_kernel<decltype(t), decltype(nhwc)::value>>(l, a, run);
  });
}

}  // namespace cuda
}  // namespace coordatt
