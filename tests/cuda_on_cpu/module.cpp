// The emulator's switches, for Python. Importing the module also registers torch.ops.coordatt_fast_cuda_on_cpu, the CUDA
// backend's operators on CPU tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulator.h"

using coordatt::cuda::Device;
using emulator::settings;

namespace coordatt {
namespace cuda {

const char* device_of(const Run&, const Device*& found) {
  found = &settings.device;
  return nullptr;
}

}  // namespace cuda
}  // namespace coordatt

int emulator::device_index() { return settings.device_index; }

PYBIND11_MODULE(coordatt_cuda_on_cpu, m) {
  m.def("set_seed", [](uint64_t seed) { settings.seed = seed; });
  m.def("skip", [](int site) { settings.skip = site; }, "Leaves out a waiting statement, by its number among sites(); -1: none.");
  m.def("sites", &emulator::sites, "file:line of every waiting statement that has been reached.");
  m.def("set_device", [](int arch, int processors, int shared_memory) {
    ++settings.device_index;
    settings.device = {arch, processors, shared_memory, shared_memory + 1024, arch >= 90 ? 16 : 0};
  }, pybind11::arg("arch"), pybind11::arg("processors"), pybind11::arg("shared_memory"));
  m.def("set_forward", &coordatt::cuda::set_forward);
  m.def("launches", &emulator::launches, "Names and sizes of the launches since the last call.");
}
