// The library: all operators' schemas, and what can be asked about it and set.
#include "bindings.h"
#include "cpu/kernels.h"
#ifdef COORDATT_CUDA
#include "cuda/kernels.h"
#include "cuda/verified.h"
#endif

namespace coordatt {
namespace bindings {

// hub/assemble.py looks for it in the built file, and writes another name after the colon.
const char operators_name[80] = "operators registered under:coordatt_fast";
const char* operators_namespace() { return operators_name + sizeof("operators registered under:") - 1; }

namespace {

// What the library was built with for CUDA, and on which architectures its ways forward have been verified.
std::string cuda_built() {
#ifdef COORDATT_CUDA
  std::string text = "{\"built\": \"" COORDATT_CUDA "\", \"verified\": [", comma;
  for (const cuda::Verified& v : cuda::verified) {
    if (!v.arch) continue;
    text += comma + "[\"" + v.way + "\", " + std::to_string(v.arch) + "]";
    comma = ", ";
  }
  return text + "]}";
#else
  return "null";
#endif
}

std::string build_info() {
  return std::string("{\"version\": \"" COORDATT_VERSION "\", \"torch_built\": \"" COORDATT_TORCH_BUILT "\", \"compiler\": \"") +
         COORDATT_COMPILER "\", \"simd_compiled\": \"" + compiled_levels() + "\", \"cuda\": " + cuda_built() + "}";
}

std::string simd_level() { return kernels().level; }

void set_simd_level(std::string level) {
  const char* problem = set_level(level.c_str());
  CHECK(!problem, "SIMD level '", level, "': ", problem ? problem : "", "; compiled in: ", compiled_levels());
}

void set_cuda_forward(std::string way) {
#ifdef COORDATT_CUDA
  CHECK(cuda::set_forward(way.c_str()), "'", way, "' is no way forward: expected '', any, chain, cluster:1, :2, :4, :8, :16 or resident");
#else
  CHECK(false, "this library was built without CUDA, '", way, "' cannot be set");
#endif
}

}  // namespace

COORDATT_REGISTER(definitions, nullptr, m) {
  define_operators(m);
  m.def("build_info() -> str");
  m.def("simd_level() -> str");
  m.def("set_simd_level(str level) -> ()");
  m.def("set_cuda_forward(str way) -> ()");
  m.def("cuda_forward_way(Tensor x, int mid, bool training) -> str");
  m.def("cuda_forward_outline(Tensor x, int mid, bool training) -> str");
}

COORDATT_REGISTER(implementations, "CompositeExplicitAutograd", m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("simd_level", TORCH_BOX(&simd_level));
  m.impl("set_simd_level", TORCH_BOX(&set_simd_level));
  m.impl("set_cuda_forward", TORCH_BOX(&set_cuda_forward));
}

}  // namespace bindings
}  // namespace coordatt
