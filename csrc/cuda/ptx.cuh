// The instructions that CUDA C++ has no words for, each behind a named function, and the names of the stored types.
// Compiled for a CPU (COORDATT_ON_CPU) the same names come from tests/cuda_on_cpu/emulator.h.
#pragma once

#ifdef COORDATT_ON_CPU
#include "emulator.h"
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace coordatt {
namespace cuda {

using bf16 = __nv_bfloat16;
using half = __half;

__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(half v) { return __half2float(v); }
__device__ __forceinline__ void narrow(float v, bf16& to) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void narrow(float v, half& to) { to = __float2half_rn(v); }

// A block's dynamic shared memory.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// A barrier in shared memory that counts arrivals and, for bulk copies, bytes. It is waited for by the parity of the
// phase: 0 the first time round.
using Barrier = uint64_t;

__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

// Makes barrier_init known to bulk copies; a __syncthreads must follow.
__device__ __forceinline__ void barrier_init_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(Barrier* b) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(b)) : "memory");
}

__device__ __forceinline__ void barrier_wait(Barrier* b, int parity) {
  uint32_t done;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#else
    asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
#endif
  } while (!done);
}

// Whether bulk copies exist (sm_90 and newer).
__device__ constexpr bool bulk_copies() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

// Arrives at b and announces that bulk copies will bring this many bytes in this phase.
__device__ __forceinline__ void barrier_expect(Barrier* b, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
#endif
}

// Copies global to shared memory, counted by b; both addresses and bytes are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, int bytes, Barrier* b) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(b))
               : "memory");
#endif
}

// This thread's copy of 16 bytes; copy_arrive arrives at b when all its copies so far have landed.
__device__ __forceinline__ void copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)) : "memory");
}
__device__ __forceinline__ void copy_arrive(Barrier* b) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b)) : "memory");
}

// All threads of the cluster (sm_90 and newer) arrive and wait; what was written to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What lies at this shared address in the block of that rank.
__device__ __forceinline__ float cluster_load(const float* p, int rank) {
  float v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f32 %0, [a]; }"
               : "=f"(v) : "r"(shared_address(p)), "r"(rank) : "memory");
#endif
  return v;
}
__device__ __forceinline__ double cluster_load(const double* p, int rank) {
  double v = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b32 a; mapa.shared::cluster.u32 a, %1, %2; ld.shared::cluster.f64 %0, [a]; }"
               : "=d"(v) : "r"(shared_address(p)), "r"(rank) : "memory");
#endif
  return v;
}

// All blocks of a cooperative launch arrive and wait; global writes before are seen after.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Programmatic dependent launch: waits until the kernel before in the stream has finished and its writes are seen; and
// allows the kernel after to start its blocks (which then wait in turn).
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace cuda
}  // namespace coordatt

#endif
