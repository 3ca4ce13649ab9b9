// Runs CUDA kernels on a CPU: csrc/cuda's kernels compile as C++ against this header, in place of ptx.cuh's instructions.
// One fiber per CUDA thread. A fiber runs until it waits for others; which one goes on is drawn at random from a seed.
// Shared memory starts as NaN. Asynchronous copies happen at a later point of the schedule, at once or as late as possible,
// also drawn. Every waiting statement is a site that can be left out by number: the suite must fail without it.
// Not modelled: fences, weak memory ordering between running threads, timing.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "passes.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

struct Index {
  unsigned x, y, z;
};
struct Where {  // of the running fiber
  Index thread, block, block_dim, grid_dim;
  char* shared;
};
extern Where here;

// What tests set.
struct Settings {
  uint64_t seed = 0;
  int skip = -1;  // the site that is left out
  coordatt::cuda::Device device = {90, 4, 232448, 233472, 16};
  int device_index = 0;  // another for every device set: plans are kept by it
};
extern Settings settings;

int site(const char* file, int line);
const std::vector<std::string>& sites();

void sync_threads(int site);
void barrier_init(uint64_t* b, int arrivals);
void barrier_arrive(uint64_t* b);
void barrier_wait(int site, uint64_t* b, int parity);
void barrier_expect(uint64_t* b, int bytes);
void bulk_copy(void* shared, const void* global, int bytes, uint64_t* b);
void copy16(void* shared, const void* global);
void copy_arrive(uint64_t* b);
void cluster_sync(int site);
const void* cluster_address(const void* p, int rank);
void grid_sync(int site);
void grid_dependency_wait(int site);
void shuffle_xor(void* value, int bytes, int mask);

void enqueue(const coordatt::cuda::Launch&, const char* name, std::function<void()> kernel);
std::vector<std::string> launches();
int device_index();
// Runs what was launched; throws std::runtime_error on a deadlock and the like.
void finish();

}  // namespace emulator

#define COORDATT_SITE ([] { static const int id = emulator::site(__FILE__, __LINE__); return id; }())
#define threadIdx (emulator::here.thread)
#define blockIdx (emulator::here.block)
#define blockDim (emulator::here.block_dim)
#define gridDim (emulator::here.grid_dim)
#define __syncthreads() emulator::sync_threads(COORDATT_SITE)
#define barrier_wait(b, parity) emulator::barrier_wait(COORDATT_SITE, b, parity)
#define cluster_sync() emulator::cluster_sync(COORDATT_SITE)
#define grid_sync() emulator::grid_sync(COORDATT_SITE)
#define grid_dependency_wait() emulator::grid_dependency_wait(COORDATT_SITE)

template <class T> T __shfl_xor_sync(unsigned, T v, int mask) {
  emulator::shuffle_xor(&v, sizeof v, mask);
  return v;
}

namespace coordatt {
namespace cuda {

struct bf16 { uint16_t bits; };
struct half { _Float16 value; };

inline float widen(bf16 v) {
  uint32_t bits = (uint32_t)v.bits << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float widen(half v) { return (float)v.value; }
inline void narrow(float v, bf16& to) {  // to nearest even
  uint32_t bits;
  memcpy(&bits, &v, 4);
  to.bits = v != v ? 0x7fff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float v, half& to) { to.value = (_Float16)v; }

inline char* shared_memory() { return emulator::here.shared; }

using Barrier = uint64_t;
using emulator::barrier_arrive;
using emulator::barrier_expect;
using emulator::barrier_init;
using emulator::bulk_copy;
using emulator::copy16;
using emulator::copy_arrive;
inline void barrier_init_fence() {}
inline bool bulk_copies() { return emulator::settings.device.arch >= 90; }
template <class A> A cluster_load(const A* p, int rank) { return *(const A*)emulator::cluster_address(p, rank); }
inline void grid_dependency_launch() {}

template <auto kernel, class Args> const char* launch_kernel(const Launch& l, const Args& args, const Run&) {
  emulator::enqueue(l, __PRETTY_FUNCTION__, [args] { kernel(args); });
  return nullptr;
}
template <auto kernel> int clusters_that_fit(const Launch& l, const Run&) {
  const Device& d = emulator::settings.device;
  return l.cluster > d.max_cluster || l.shared > d.shared_memory ? 0 : d.processors / l.cluster > 1 ? d.processors / l.cluster : 1;
}
template <auto kernel> int blocks_that_fit(const Launch& l, const Run&) {
  const Device& d = emulator::settings.device;
  return d.processors * (d.shared_per_processor / (l.shared + 1024));
}

}  // namespace cuda
}  // namespace coordatt
