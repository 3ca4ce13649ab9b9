// Gate forward: the middle's second half, and x -> out. Backward: grad, x -> the gradients before the sigmoids.
#include "gate.cuh"

#include "launch.cuh"
#include "mix.cuh"
#include "pool.cuh"
#include "stream.cuh"

namespace coordatt {
namespace cuda {

template <class T, bool NHWC>
__global__ void __launch_bounds__(threads_of_pass, least_blocks<T>) gate_kernel(const __grid_constant__ GatePass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  Shared<A> shared(a.room, 1);
  // Backwards: what the pass before read last is still in the L2 cache.
  Place place = place_of(g, gridDim.x - 1 - blockIdx.x);
  Stream<T, NHWC, 1> x{g, place, {View<const T>(a.x)}, shared.ring(), shared.barriers(), 0};
  A *gates = shared.lines(0), *chunk = shared.chunk();
  x.start();
  grid_dependency_wait();
  if (a.logits.h.data) {
    read_lines<NHWC>(g, place, a.logits, gates, [](int, A v) { return sigmoid(v); });
  } else {
    const A *partial = (const A*)a.partial, *squeezed = (const A*)a.saved.squeezed + (int64_t)place.n * g.m * g.l;
    Param mean = a.params.mean, var = a.params.var;
    if (!partial && a.norm == Norm::batch) {
      mean = wide<A>(a.saved.mean);
      var = wide<A>(a.saved.var);
    }
    Weight<T> bias(a.params.conv1_bias);
    for_chunks(g, chunk, [&](int m, int l) {
      A z = partial ? sum_partials(g, partial, place.n, m, l) + (bias ? bias[m] : A(0)) : squeezed[m * g.l + l];
      return activate(a.activation, affine<T>(a, m, mean, var)(z));
    }, [&](int l0, int count) { gates_from<NHWC, T>(g, a.params, chunk, l0, count, place, gates); });
  }
  __syncthreads();
  if (a.saved.gates) store_lines<NHWC>(g, place, gates, (A*)a.saved.gates);
  if (a.tracked && blockIdx.x == 0 && threadIdx.x == 0) ++*a.tracked;
  for (int k = 0; k < x.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    x.wait(k);
    apply_piece<NHWC>(g, place, p, x.values(0, k, p), View<T>(a.out), Gating<A>{{gates}, a.skip});
    x.advance(k);
  }
}

template <class T, bool NHWC>
__global__ void __launch_bounds__(threads_of_pass, least_blocks<T>) reduce_kernel(const __grid_constant__ ReducePass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  Shared<A> shared(a.room, 2);
  Place place = place_of(g, blockIdx.x);
  Stream<T, NHWC, 2> maps{g, place, {View<const T>(a.grad), View<const T>(a.x)}, shared.ring(), shared.barriers(), 0};
  A *gates = shared.lines(0), *ds = shared.lines(1);
  maps.start();
  if (a.gates) load_lines<NHWC>(g, place, (const A*)a.gates, gates);
  else read_lines<NHWC>(g, place, a.logits, gates, [](int, A v) { return sigmoid(v); });
  __syncthreads();
  for (int k = 0; k < maps.pieces; ++k) {
    Piece p = piece_of<NHWC>(g, place.channels, k);
    maps.wait(k);
    const T *grad = maps.values(0, k, p), *x = maps.values(1, k, p);
    reduce_piece<NHWC>(g, p, grad, x, gates, ds);
    if (a.dx.data) apply_piece<NHWC>(g, place, p, grad, View<T>(a.dx), Gating<A>{{gates}, a.skip});
    maps.advance(k);
  }
  grid_dependency_launch();
  __syncthreads();
  if (a.dlogits.h.data) {
    write_lines<NHWC>(g, place, ds, a.dlogits);
    return;
  }
  store_lines<NHWC>(g, place, ds, (A*)a.ds);
  Matrix<T> conv_h{a.params.conv_h_weight, g.m, 1}, conv_w{a.params.conv_w_weight, g.m, 1};
  contract_lines<NHWC>(g, ds, conv_h, conv_w, place, (A*)a.partial + (int64_t)blockIdx.x * g.m * g.l);
}

const char* launch(const GatePass& a, const Run& run) {
  return for_map(a, [&](auto t, auto nhwc) {
    Launch l{a.geometry.n * a.geometry.groups, threads_of_pass, a.room.total(1, 1)};
    l.dependent = !a.logits.h.data;
    return launch_kernel<gate_kernel<decltype(t), decltype(nhwc)::value>>(l, a, run);
  });
}

const char* launch(const ReducePass& a, const Run& run) {
  return for_map(a, [&](auto t, auto nhwc) {
    Launch l{a.geometry.n * a.geometry.groups, threads_of_pass, a.room.total(2, 2)};
    return launch_kernel<reduce_kernel<decltype(t), decltype(nhwc)::value>>(l, a, run);
  });
}

}  // namespace cuda
}  // namespace coordatt
