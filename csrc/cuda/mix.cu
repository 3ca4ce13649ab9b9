// Mix: what spans the whole batch, a block for each row m of the squeezed middle.
#include "mix.cuh"

#include "launch.cuh"

namespace coordatt {
namespace cuda {

template <class T>
__global__ void __launch_bounds__(threads_of_rows, 2) statistics_kernel(const __grid_constant__ StatisticsPass a) {
  grid_dependency_wait();
  statistics_of<T>(a, blockIdx.x, (Acc<T>*)shared_memory());
  grid_dependency_launch();
}

// dy -> du -> dz, y, and the gradients of the normalisation's parameters and of conv1's bias.
template <class T> __global__ void __launch_bounds__(threads_of_rows, 2) rows_kernel(const __grid_constant__ RowsPass a) {
  using A = Acc<T>;
  const Geometry& g = a.geometry;
  A* scratch = (A*)shared_memory();
  int m = blockIdx.x;
  int rows = g.n * g.l;
  const A* squeezed = (const A*)a.saved.squeezed;
  A *y = (A*)a.y, *dz = (A*)a.dz;
  Affine<A> f = affine<T>(a, m, wide<A>(a.saved.mean), wide<A>(a.saved.var));
  grid_dependency_wait();
  A sum = 0, along = 0;
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    int n = g.by_l(r), l = r - n * g.l;
    int64_t i = ((int64_t)n * g.m + m) * g.l + l;
    A dy = sum_partials(g, (const A*)a.partial, n, m, l), off = squeezed[i] - f.mean, u = off * f.scale + f.shift;
    A du = activate_backward(a.activation, u, dy);
    y[i] = activate(a.activation, u);
    dz[i] = du;
    sum += du;
    along += du * off;
  }
  sum = block_sum(sum, scratch);
  along = block_sum(along, scratch);
  if (threadIdx.x == 0) {
    if (a.out.bn_weight) set<T>(a.out.bn_weight, m, along * f.inverse);
    if (a.out.bn_bias) set<T>(a.out.bn_bias, m, sum);
    // Under batch statistics the mean takes any shift out again: exactly zero.
    if (a.out.conv1_bias) set<T>(a.out.conv1_bias, m, a.norm == Norm::batch ? A(0) : sum * f.scale);
  }
  bool batch = a.norm == Norm::batch;
  A shift = batch ? sum / (A)rows : A(0), slope = batch ? f.inverse * f.inverse * (along / (A)rows) : A(0);
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    int n = g.by_l(r), l = r - n * g.l;
    int64_t i = ((int64_t)n * g.m + m) * g.l + l;
    A du = dz[i];
    dz[i] = (batch ? du - shift - (squeezed[i] - f.mean) * slope : du) * f.scale;
  }
  grid_dependency_launch();
}

template <class T> __global__ void update_kernel(const __grid_constant__ UpdatePass a) {
  using A = Acc<T>;
  for (int m = threadIdx.x; m < a.m && a.rows > 0; m += blockDim.x)
    move_statistics<T>(a.running, m, a.rows, ((const A*)a.mean)[m], ((const A*)a.var)[m]);
  __syncthreads();
  if (a.running.tracked && threadIdx.x == 0) ++*a.running.tracked;
}

const char* launch(const StatisticsPass& a, const Run& run) {
  return for_type(a.dtype, [&](auto t) {
    Launch l{a.geometry.m, threads_of_rows, 34 * 8};
    l.dependent = true;
    return launch_kernel<statistics_kernel<decltype(t)>>(l, a, run);
  });
}

const char* launch(const RowsPass& a, const Run& run) {
  return for_type(a.dtype, [&](auto t) {
    Launch l{a.geometry.m, threads_of_rows, 34 * 8};
    l.dependent = true;
    return launch_kernel<rows_kernel<decltype(t)>>(l, a, run);
  });
}

const char* launch(const UpdatePass& a, const Run& run) {
  return for_type(a.dtype, [&](auto t) {
    return launch_kernel<update_kernel<decltype(t)>>(Launch{1, 256, 0}, a, run);
  });
}

}  // namespace cuda
}  // namespace coordatt
