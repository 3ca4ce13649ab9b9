// The library's environment variables (docs/environment.md), read when it is loaded. What cannot be used has no effect:
// coordatt_fast/library.py says so.
#pragma once

#include <stdint.h>

namespace coordatt {

struct Environment {
  int64_t keep_bytes;  // COORDATT_FAST_KEEP_MB
  bool poison;         // COORDATT_FAST_POISON
};

const Environment& environment();

}  // namespace coordatt
