// The numbers of csrc/cpu that were chosen by measurement, with what was measured: one thread, float32, a server core with
// AVX-512 and 2 MB of L2, unless it says otherwise. Those marked (bits) decide the order of a sum: they may not depend on
// threads, and another value gives other last bits. What registers or a vector's lanes dictate stands where it is used.
#pragma once

#include <stdint.h>

namespace coordatt {

// The walks over a map (walks.h).

// Rows up to which a group of planes is summed together: 960 x 7 x 7 takes 12.6 us instead of 20.8; from about 24 rows on the
// group's partial sums no longer fit L1. (bits)
constexpr int64_t short_plane = 24;

// How far ahead a map is fetched: one page, at whose end the hardware prefetcher stops, and small maps change page every few
// planes.
constexpr int64_t prefetch_bytes = 4096;

// Bytes of an nhwc image from which on sums go pixel by pixel: an L2, beyond which the strides of a group of channels, which
// the hardware does not prefetch, cost more than sums kept in memory (256 x 80 x 80: 442 us by groups, reduce 887).
constexpr int64_t large_map = 2 << 20;
constexpr int64_t narrow_pixel = 64;  // channels up to which a group of channels is most of a pixel anyway

constexpr int most_rows_together = 4;  // rows of pixels summed at a time, for which there is scratch

// How a call is cut into tasks (work.cpp).

// Bytes of an nhwc image from which on gates and dx are shared by rows rather than by channels (two threads: 144 x 56 x 56
// 118 us instead of 177; 576 x 7 x 7 34 us instead of 30). Lower than large_map, for here no sum has to be kept in memory.
constexpr int64_t whole_pixels_from = 256 << 10;

constexpr double worth_waking = 10000;  // nanoseconds of estimated work below which one thread does a call

// The middle (forward.cpp, backward.cpp).

constexpr int64_t squeeze_rows = 16;      // rows a task of the squeeze takes: few, so that a batch of one has several tasks
constexpr int64_t backward_rows = 128;    // rows a task of the middle's backward pass takes (bits)
// Rows added up one after another in a weight's gradient, before their sum joins the others' (bits; for W = 130 with 256
// conv_w's was off by 5.98 ulp, with 32 by 0.72, plain PyTorch's by 1.29).
constexpr int64_t summed_rows = 32;
constexpr int64_t panel_channels = 32;    // channels of a weight transposed, or of its gradient formed, at a time, within L1

// Memory.

constexpr int64_t kept_scratch = 16 << 20;  // a thread's larger scratch goes back to the system after the call

}  // namespace coordatt
