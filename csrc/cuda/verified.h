// What has passed its tests on a real GPU (tests/gpu), by architecture (90: sm_90). auto takes no CUDA kernels on others,
// and the choice of a way forward takes no other ways.
#pragma once

#include <string.h>

namespace coordatt {
namespace cuda {

struct Verified {
  const char* way;  // "chain" (and all of backward), "cluster" or "resident"
  int arch;
};

constexpr Verified verified[] = {{"", 0}};  // none yet

inline bool is_verified(const char* way, int arch) {
  for (const Verified& v : verified)
    if (v.arch == arch && !strcmp(v.way, way)) return true;
  return false;
}

}  // namespace cuda
}  // namespace coordatt
