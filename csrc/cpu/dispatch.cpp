// Which SIMD level runs: the widest compiled in that the processor has, unless a lower one is asked for.
#include <stdlib.h>
#include <string.h>

#include <atomic>

#include "kernels.h"

namespace coordatt {
namespace {

struct Level {
  const char* name;
  bool (*supported)();
  void (*pool)(Kernels&);
  void (*mix)(Kernels&);
  void (*gate)(Kernels&);
  void (*norm)(Kernels&);
};

#if defined(__x86_64__)
bool has_baseline() { return true; }
#endif
#if defined(COORDATT_HAVE_AVX2)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#if defined(COORDATT_HAVE_AVX512)
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
}
#endif
#if defined(COORDATT_HAVE_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// AVX-512, but for the kernels of bfloat16 maps.
void add_pool_bf16(Kernels& k) {
  avx512::add_pool(k);
  avx512_bf16::add_pool(k);
}
void add_gate_bf16(Kernels& k) {
  avx512::add_gate(k);
  avx512_bf16::add_gate(k);
}
void add_norm_bf16(Kernels& k) {
  avx512::add_norm(k);
  avx512_bf16::add_norm(k);
}
#endif
#if defined(COORDATT_HAVE_NEON)
bool has_neon() { return true; }
#endif

// Widest first.
const Level levels[] = {
#if defined(COORDATT_HAVE_AVX512_BF16)
    {"avx512_bf16", has_avx512_bf16, add_pool_bf16, avx512::add_mix, add_gate_bf16, add_norm_bf16},
#endif
#if defined(COORDATT_HAVE_AVX512)
    {"avx512", has_avx512, avx512::add_pool, avx512::add_mix, avx512::add_gate, avx512::add_norm},
#endif
#if defined(COORDATT_HAVE_AVX2)
    {"avx2", has_avx2, avx2::add_pool, avx2::add_mix, avx2::add_gate, avx2::add_norm},
#endif
#if defined(COORDATT_HAVE_NEON)
    {"neon", has_neon, neon::add_pool, neon::add_mix, neon::add_gate, neon::add_norm},
#else
    {"baseline", has_baseline, baseline::add_pool, baseline::add_mix, baseline::add_gate, baseline::add_norm},
#endif
};
constexpr int level_count = sizeof(levels) / sizeof(levels[0]);

Kernels tables[level_count];
std::atomic<const Kernels*> current{nullptr};

const Kernels* table(int i) {
  Kernels& k = tables[i];
  k.level = levels[i].name;
  levels[i].pool(k);
  levels[i].mix(k);
  levels[i].gate(k);
  levels[i].norm(k);
  return &k;
}

const Kernels* widest() {
  for (int i = 0; i < level_count; ++i)
    if (levels[i].supported()) return table(i);
  return table(level_count - 1);
}

}  // namespace

const char* set_level(const char* name) {
  if (!name || !*name) {
    current = widest();
    return nullptr;
  }
  for (int i = 0; i < level_count; ++i)
    if (strcmp(levels[i].name, name) == 0) {
      if (!levels[i].supported()) return "this processor does not have it";
      current = table(i);
      return nullptr;
    }
  return "this library was not compiled with it";
}

const Kernels& kernels() {
  const Kernels* k = current.load(std::memory_order_acquire);
  if (k) return *k;
  if (set_level(getenv("COORDATT_FAST_SIMD"))) set_level("");
  return *current.load(std::memory_order_acquire);
}

const char* compiled_levels() {
  return ""
#if defined(COORDATT_HAVE_AVX512_BF16)
         "avx512_bf16,"
#endif
#if defined(COORDATT_HAVE_AVX512)
         "avx512,"
#endif
#if defined(COORDATT_HAVE_AVX2)
         "avx2,"
#endif
#if defined(COORDATT_HAVE_NEON)
         "neon";
#else
         "baseline";
#endif
}

}  // namespace coordatt
