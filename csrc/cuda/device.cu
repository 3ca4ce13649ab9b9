// What the device is, asked of CUDA once.
#include <cuda_runtime.h>

#include <mutex>

#include "passes.h"

namespace coordatt {
namespace cuda {

const char* device_of(const Run& run, const Device*& found) {
  constexpr int most = 64;
  static Device devices[most];
  static std::once_flag once[most];
  static cudaError_t error[most];
  if (run.device < 0 || run.device >= most) return "device index out of range";
  std::call_once(once[run.device], [&] {
    auto ask = [&](cudaDeviceAttr what) {
      int value = 0;
      cudaError_t e = cudaDeviceGetAttribute(&value, what, run.device);
      if (e != cudaSuccess) error[run.device] = e;
      return value;
    };
    Device& d = devices[run.device];
    d.arch = ask(cudaDevAttrComputeCapabilityMajor) * 10 + ask(cudaDevAttrComputeCapabilityMinor);
    d.processors = ask(cudaDevAttrMultiProcessorCount);
    d.shared_memory = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    d.shared_per_processor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    d.max_cluster = d.arch >= 90 && ask(cudaDevAttrClusterLaunch) ? 16 : 0;
  });
  found = &devices[run.device];
  return error[run.device] == cudaSuccess ? nullptr : cudaGetErrorString(error[run.device]);
}

}  // namespace cuda
}  // namespace coordatt
