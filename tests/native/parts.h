// The parts of the driver: each adds what it finds to the report, at every SIMD level given.
#pragma once

#include "cpu/kernels.h"
#include "tolerance.h"

namespace native {

using Levels = std::vector<const char*>;

// One of several drivers that share the cases: takes every count-th.
struct Share {
  int64_t index = 0, count = 1, next = 0;
  bool mine() { return next++ % count == index; }
};

// Whole calls and the passes alone (calls.cpp), over the cases of cases.cpp.
void check_calls(Report&, const Levels&, uint64_t seed, Share&);
// The middle's kernels, one by one (middle.cpp).
void check_middle(Report&, const Levels&, uint64_t seed, Share&);
// Half-precision numbers into the accumulate type and back, all of them (conversions.cpp).
void check_conversions(Report&, const Levels&, Share&);

}  // namespace native
