// Launching: every kernel takes one struct.
#pragma once

#include <atomic>
#include <type_traits>

#include "passes.h"
#include "ptx.cuh"

namespace coordatt {
namespace cuda {

#ifndef COORDATT_ON_CPU

inline const char* text_of(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

// Once per kernel and device: lets it have all the shared memory that there is.
template <auto kernel> const char* prepare(int device, int shared_memory) {
  static std::atomic<uint64_t> ready{0};
  uint64_t bit = 1ull << (device & 63);
  if (ready.load(std::memory_order_relaxed) & bit) return nullptr;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_memory);
  if (e == cudaSuccess) ready |= bit;
  return text_of(e);
}

struct Config {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[3];
  Config(const Launch& l, const Run& run, int arch) {
    config.gridDim = dim3(l.blocks);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = (cudaStream_t)run.stream;
    config.attrs = attributes;
    if (l.cluster > 1) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = l.cluster;
      a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (l.dependent && arch >= 90) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
    if (l.cooperative) {
      cudaLaunchAttribute& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeCooperative;
      a.val.cooperative = 1;
    }
  }
};

template <auto kernel, class Args> const char* launch_kernel(const Launch& l, const Args& args, const Run& run) {
  const Device* device;
  if (const char* why = device_of(run, device)) return why;
  if (const char* why = prepare<kernel>(run.device, device->shared_memory)) return why;
  if (l.cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  Config c(l, run, device->arch);
  return text_of(cudaLaunchKernelEx(&c.config, kernel, args));
}

template <auto kernel> int blocks_that_fit(const Launch& l, const Run& run) {
  const Device* device;
  if (device_of(run, device) || prepare<kernel>(run.device, device->shared_memory)) return 0;
  int found = 0;
  cudaError_t e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, l.threads, l.shared);
  return e == cudaSuccess ? found * device->processors : 0;
}

template <auto kernel> int clusters_that_fit(const Launch& l, const Run& run) {
  if (l.cluster == 1) return blocks_that_fit<kernel>(l, run);  // the query below refuses launches without a cluster size
  const Device* device;
  if (device_of(run, device) || prepare<kernel>(run.device, device->shared_memory)) return 0;
  if (l.cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  Config c(l, run, device->arch);
  int found = 0;
  return cudaOccupancyMaxActiveClusters(&found, kernel, &c.config) == cudaSuccess ? found : 0;
}

#endif

// Calls f with a value of the stored type, and of std::bool_constant for the layout.
template <class F> const char* for_type(DType t, F f) {
  switch (t) {
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(half{});
    default: return f(float{});
  }
}
template <class F> const char* for_map(const Call& call, F f) {
  return for_type(call.dtype, [&](auto t) { return call.nhwc ? f(t, std::true_type{}) : f(t, std::false_type{}); });
}

}  // namespace cuda
}  // namespace coordatt
