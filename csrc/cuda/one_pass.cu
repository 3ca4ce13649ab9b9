// The whole forward in one launch: x is read once, stays in shared memory between pool and gate, out is written once.
#include "gate.cuh"
#include "launch.cuh"
#include "mix.cuh"
#include "pool.cuh"
#include "stream.cuh"

namespace coordatt {
namespace cuda {

// Inference, nchw. A cluster of g.groups blocks owns an image at a time, each block some channels, all of whose pieces
// have a stage of their own. As soon as a piece has been gated, the next image's takes its stage.
template <class T>
__global__ void __launch_bounds__(threads_of_one_pass, 1) one_pass_kernel(const __grid_constant__ OnePass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  Shared<A> shared(a.room, 1);
  int clusters = gridDim.x / g.groups, middle = g.m * g.l;
  Place place = place_of(g, blockIdx.x);
  place.n = blockIdx.x / g.groups;
  Stream<T, false, 1> x{g, place, {View<const T>(a.x)}, shared.ring(), shared.barriers(), 0};
  A *lines = shared.lines(0), *y = shared.chunk(), *parts = y + middle;
  Weight<T> bias(a.params.conv1_bias);
  x.start();
  for (int round = 0; x.place.n < g.n; ++round) {
    for (int k = 0; k < x.pieces; ++k) {
      Piece p = piece_of<false>(g, place.channels, k);
      x.wait(k + round * g.stages);
      pool_piece<false>(g, p, x.values(0, k, p), lines);
    }
    __syncthreads();
    // Two buffers in turn: the image after the next is a cluster_sync further on, when all have read this one.
    A* part = parts + (round & 1) * middle;
    Matrix<T> conv1{a.params.conv1_weight, 1, g.c};
    contract_lines<false>(g, lines, conv1, conv1, place, part);
    cluster_sync();
    for (int i = threadIdx.x; i < middle; i += blockDim.x) {
      int m = g.by_l(i);
      A z = bias ? bias[m] : A(0);
      for (int rank = 0; rank < g.groups; ++rank) z += cluster_load(part + i, rank);
      y[i] = activate(a.activation, affine<T>(a, m, a.params.mean, a.params.var)(z));
    }
    __syncthreads();
    gates_from<false, T>(g, a.params, y, 0, g.l, place, lines);
    __syncthreads();
    Stream<T, false, 1> next = x;
    next.place.n += clusters;
    for (int k = 0; k < x.pieces; ++k) {
      Piece p = piece_of<false>(g, place.channels, k);
      apply_piece<false>(g, x.place, p, x.values(0, k, p), View<T>(a.out), Gating<A>{{lines}, a.skip});
      if (next.place.n >= g.n) continue;
      __syncthreads();
      next.fill(k);
    }
    x.place.n = next.place.n;
  }
  cluster_sync();  // no block leaves while another reads its part
}

// Training. All of x lies in the shared memory of a cooperative grid, so that the batch statistics need no second read.
template <class T, bool NHWC>
__global__ void __launch_bounds__(threads_of_one_pass, 1) resident_kernel(const __grid_constant__ OnePass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  Shared<A> shared(a.room, 1);
  Place place = place_of(g, blockIdx.x);
  Stream<T, NHWC, 1> x{g, place, {View<const T>(a.x)}, shared.ring(), shared.barriers(), 0};
  A *lines = shared.lines(0), *chunk = shared.chunk();
  x.start();
  for (int k = 0; k < x.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    x.wait(k);
    pool_piece<NHWC>(g, p, x.values(0, k, p), lines);
  }
  __syncthreads();
  store_lines<NHWC>(g, place, lines, (A*)a.saved.pooled);
  Matrix<T> conv1{a.params.conv1_weight, 1, g.c};
  contract_lines<NHWC>(g, lines, conv1, conv1, place, (A*)a.partial + (int64_t)blockIdx.x * g.m * g.l);
  grid_sync();
  for (int m = blockIdx.x; m < g.m; m += gridDim.x) statistics_of<T>(a, m, chunk);
  grid_sync();
  const A* squeezed = (const A*)a.saved.squeezed + (int64_t)place.n * g.m * g.l;
  for_chunks(g, chunk, [&](int m, int l) {
    return activate(a.activation, affine<T>(a, m, wide<A>(a.saved.mean), wide<A>(a.saved.var))(squeezed[m * g.l + l]));
  }, [&](int l0, int count) { gates_from<NHWC, T>(g, a.params, chunk, l0, count, place, lines); });
  __syncthreads();
  store_lines<NHWC>(g, place, lines, (A*)a.saved.gates);
  if (a.running.tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*a.running.tracked;
  for (int k = 0; k < x.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    apply_piece<NHWC>(g, place, p, x.values(0, k, p), View<T>(a.out), Gating<A>{{lines}, a.skip});
  }
}

static Launch one_pass(int cluster, int shared, int clusters) {
  Launch l{clusters * cluster, threads_of_one_pass, shared};
  l.cluster = cluster;
  return l;
}

int clusters_held(const OnePass& a, int cluster, int shared, const Run& run) {
  int found = 0;
  for_type(a.dtype, [&](auto t) {
    found = clusters_that_fit<one_pass_kernel<decltype(t)>>(one_pass(cluster, shared, 1), run);
    return (const char*)nullptr;
  });
  return found;
}

const char* launch_one_pass(const OnePass& a, int cluster, int clusters, int shared, const Run& run) {
  return for_type(a.dtype, [&](auto t) {
    return launch_kernel<one_pass_kernel<decltype(t)>>(one_pass(cluster, shared, clusters), a, run);
  });
}

static Launch resident_training(const OnePass& a, int shared) {
  Launch l{a.geometry.n * a.geometry.groups, threads_of_one_pass, shared};
  l.cooperative = true;
  return l;
}

int training_blocks_held(const OnePass& a, int shared, const Run& run) {
  int found = 0;
  for_map(a, [&](auto t, auto nhwc) {
    found = blocks_that_fit<resident_kernel<decltype(t), decltype(nhwc)::value>>(resident_training(a, shared), run);
    return (const char*)nullptr;
  });
  return found;
}

const char* launch_resident_training(const OnePass& a, int shared, const Run& run) {
  return for_map(a, [&](auto t, auto nhwc) {
    return launch_kernel<resident_kernel<decltype(t), decltype(nhwc)::value>>(resident_training(a, shared), a, run);
  });
}

}  // namespace cuda
}  // namespace coordatt
