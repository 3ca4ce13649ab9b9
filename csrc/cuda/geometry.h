// How a call is cut up: groups of an image's channels, one to a block, walked in pieces of whole rows that pass through
// shared memory. Plain C++ for host and device; geometry.cpp chooses.
#pragma once

#include <stdint.h>

#include "coordatt.h"

#ifdef __CUDACC__
#define COORDATT_BOTH __host__ __device__ __forceinline__
#else
#define COORDATT_BOTH inline
#endif

namespace coordatt {
namespace cuda {

// Division by a constant of unsigned numbers below 2^31: a multiplication and a shift.
struct Divider {
  uint32_t multiplier = 0, shift = 0;
  Divider() = default;
  explicit Divider(int64_t d) {
    while (shift < 31 && (1ll << shift) < d) ++shift;
    multiplier = (uint32_t)((((1ull << 32) * ((1ull << shift) - (uint64_t)d)) / (uint64_t)d) + 1);
  }
  COORDATT_BOTH int operator()(int n) const {
#ifdef __CUDA_ARCH__
    uint32_t high = __umulhi((uint32_t)n, multiplier);
#else
    uint32_t high = (uint32_t)(((uint64_t)(uint32_t)n * multiplier) >> 32);
#endif
    return (int)((high + (uint32_t)n) >> shift);
  }
};

constexpr int threads_of_pass = 256;      // pool, gate and their backward passes
constexpr int blocks_per_processor = 3;   // of those, wanted at a time
constexpr int threads_of_rows = 512;      // kernels with one block per row of the middle
constexpr int threads_of_one_pass = 512;

struct Geometry {
  int n, c, h, w, m, l;  // l = h + w
  int group, groups;     // channels of a block, blocks of an image
  // A group's lines in shared memory: nchw channel by channel, pitch apart, the columns from column on; nhwc line by
  // line, pitch apart.
  int pitch, column;
  int lane_bits;       // nchw: 2 ** lane_bits neighbours add up a row together
  int piece_channels;  // nchw; nhwc pieces take the whole group
  int piece_rows;
  int down;            // pieces from the top of a plane to its bottom
  int stages, stage_bytes;  // per stage and source
  int chunk;           // lines of the middle that pass through shared memory at a time
  int copies;   // nhwc: 16-byte copies to a pixel's channels; 0: element by element
  bool vectors;        // nchw: a 16-byte vector of a row has its gates aligned in one line; nhwc: of channels
  Divider by_l, by_w, by_rows, by_group, by_copies, by_vectors, by_down, by_stages;
};

// Bytes of the parts of a block's shared memory, all multiples of 16.
struct Room {
  int barriers = 0, lines = 0, chunk = 0, ring = 0;
  int total(int arrays, int sources) const { return barriers + arrays * lines + chunk + sources * ring; }
};

// What the launchers must know of the device they run on.
struct Device {
  int arch;           // 90: sm_90
  int processors;     // SMs
  int shared_memory;  // bytes a block can be given
  int shared_per_processor;
  int max_cluster;    // blocks, 0 without clusters
};

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// H + W up to which a channel's lines fit into every device's shared memory.
inline int64_t max_length(DType t) { return 16384 / acc_bytes_of(t); }

// Whether every image (and nhwc: every pixel) of the map starts at a multiple of 16 bytes.
inline bool aligned(const Call& call, const Map& m) {
  int64_t v = 16 / bytes_of(call.dtype);
  return ((uintptr_t)m.data & 15) == 0 && m.image % v == 0 && (!call.nhwc || m.step % v == 0);
}

// A cut, the bytes of its parts, and of the whole. shared 0: it does not fit.
struct Cut {
  Geometry geometry;
  Room room;
  int shared = 0;
};

constexpr const char* too_long = "the map's lines do not fit into shared memory";

// For passes that walk the map: the kernel keeps that many arrays of lines and streams that many maps. aligned: all maps
// start at a multiple of 16 bytes, and in nhwc so does every pixel. every_block_adds: each block adds up the parts of the
// middle that all groups of channels have written.
Cut stream_cut(const Call&, bool aligned, const Device&, int arrays, int sources, bool every_block_adds = false);

// For one launch that keeps x in shared memory: an image's channels over that many blocks, every piece with a stage of
// its own. middles: how many [M, L] the kernel keeps; 0: the middle passes in chunks.
Cut resident_cut(const Call&, bool aligned, const Device&, int blocks, int middles);

}  // namespace cuda
}  // namespace coordatt
