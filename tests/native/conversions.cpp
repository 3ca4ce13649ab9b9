#include "memory.h"
#include "parts.h"

namespace native {
namespace {

// Every number of the type, in runs whose lengths leave every tail.
void to_accumulate(Report& report, const coordatt::MapKernels& k, DType t) {
  for (int64_t first = 0, count = 1; first < 65536; first += count, count = count % 67 + 1) {
    if (first + count > 65536) count = 65536 - first;
    const bool at_end = count % 2;
    Memory from(count, t, at_end), to(count, DType::f32, at_end);
    for (int64_t i = 0; i < count; ++i) ((uint16_t*)from.data())[i] = (uint16_t)(first + i);
    k.to_acc(from.data(), to.data(), count);
    bool right = to.intact();
    for (int64_t i = 0; i < count; ++i) {
      const Number value = half_value((uint16_t)(first + i), t);
      right = right && (isnan(value) ? isnan(to[i]) : to[i] == value && signbit(to[i]) == signbit(value));
    }
    report.expect(right, std::string("to_acc ") + name_of(t) + " from " + std::to_string(first));
    report.numbers += count;
  }
}

// Every number of the type, the ties between neighbours, and float32's neighbours of both.
void from_accumulate(Report& report, const coordatt::MapKernels& k, DType t, bool flushes) {
  for (int64_t first = 0, count = 1; first < 32768; first += count, count = count % 13 + 1) {
    if (first + count > 32768) count = 32768 - first;
    const bool at_end = count % 2;
    Memory from(count * 12, DType::f32, at_end), to(count * 12, t, at_end);
    for (int64_t i = 0; i < count; ++i) {
      const float value = (float)half_value((uint16_t)(first + i), t), next = (float)half_value((uint16_t)(first + i + 1), t);
      const float tie = value + (next - value) / 2;
      const float some[6] = {value, nextafterf(value, INFINITY), nextafterf(tie, 0), tie, nextafterf(tie, INFINITY), -0.0f};
      for (int j = 0; j < 6; ++j) from.set(i * 12 + j, some[j]), from.set(i * 12 + 6 + j, -some[j]);
    }
    k.from_acc(from.data(), to.data(), count * 12);
    bool right = to.intact();
    for (int64_t i = 0; i < count * 12; ++i) {
      Number value = rounded(from[i], t), got = to[i];
      if (flushes && fabs(from[i]) < 0x1p-126) value = copysign(0, value);
      right = right && (isnan(value) ? isnan(got) : got == value && signbit(got) == signbit(value));
    }
    report.expect(right, std::string("from_acc ") + name_of(t) + " from " + std::to_string(first));
    report.numbers += count * 12;
  }
}

}  // namespace

void check_conversions(Report& report, const Levels& levels, Share& share) {
  for (const char* level : levels)
    for (DType t : {DType::bf16, DType::f16}) {
      if (!share.mine()) continue;
      report.where = std::string("conversions at ") + level;
      coordatt::set_level(level);
      const coordatt::MapKernels& k = coordatt::kernels().map[(int)t];
      to_accumulate(report, k, t);
      from_accumulate(report, k, t, t == DType::bf16 && !strcmp(level, "avx512_bf16"));  // docs/numerics.md
      report.cases += 2;
      report.calls += 2;
    }
}

}  // namespace native
