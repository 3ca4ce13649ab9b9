// Every number of csrc/cpu that was chosen by measurement and that no register file or contract dictates, with its reason.
// Times are of one thread in float32 on a server core with AVX-512 and 2 MB of L2, unless it says otherwise. None but
// those marked so changes a result.
#pragma once

#include <stdint.h>

namespace coordatt {

// The walks (walks.h).

constexpr int64_t short_plane = 24;
constexpr int64_t prefetch_bytes = 4096;
constexpr int64_t large_map = 2 << 20;
constexpr int most_rows_together = 4;

}  // namespace coordatt
