#include "environment.h"

#include <stdlib.h>
#include <string.h>

namespace coordatt {
namespace {

// A whole number; one beyond most counts as most.
int64_t whole(const char* name, int64_t otherwise, int64_t most) {
  const char* value = getenv(name);
  if (!value || !*value) return otherwise;
  int64_t n = 0;
  for (; *value; ++value) {
    if (*value < '0' || *value > '9') return otherwise;
    n = n < most / 10 ? n * 10 + (*value - '0') : most;
  }
  return n;
}

Environment read() {
  const char* poison = getenv("COORDATT_FAST_POISON");
  return {whole("COORDATT_FAST_KEEP_MB", 256, INT64_MAX >> 20) << 20, poison && strcmp(poison, "1") == 0};
}

// Before any thread could hold the lock of a first use, which a fork would leave locked.
[[maybe_unused]] const Environment& at_load = environment();

}  // namespace

const Environment& environment() {
  static const Environment found = read();
  return found;
}

}  // namespace coordatt
