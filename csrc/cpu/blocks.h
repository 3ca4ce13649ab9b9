// Memory for large outputs, kept between calls. A fresh output costs more in page faults than in arithmetic, and a
// system that hands freed pages back to its host pays again each time; a block that a freed output leaves behind is
// already mapped.
#pragma once

#include <stdint.h>

namespace coordatt {

constexpr int64_t block_from = 1 << 20;  // smaller outputs stay with torch's allocator

// A block of at least `bytes`, 64-byte aligned (large ones on huge pages where the system has them). At most
// COORDATT_FAST_KEEP_MB megabytes (default 256) wait for reuse, oldest out first. Null if there is no memory, or always
// with a limit of 0.
void* take_block(int64_t bytes);
void give_block(void* block);

}  // namespace coordatt
