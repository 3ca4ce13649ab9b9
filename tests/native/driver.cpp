// The CPU kernels without torch, against scalar loops: every pass, type, layout and tail, at every SIMD level that this
// build and this processor have.
//
//     driver [seed [share shares]]
//
// Prints a line per kind of comparison and, last, what was compared; exits with 1 where anything failed.
#include <stdlib.h>

#include "parts.h"

using namespace native;

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? strtoull(argv[1], nullptr, 10) : 0;
  Share share;
  if (argc > 3) share.index = atoll(argv[2]), share.count = atoll(argv[3]);
  Levels levels;
  static std::string compiled = std::string(coordatt::compiled_levels()) + ",";
  for (char *level = compiled.data(), *end; (end = strchr(level, ',')); level = end + 1) {
    *end = 0;
    if (const char* problem = coordatt::set_level(level)) printf("not run: %s: %s\n", level, problem);
    else levels.push_back(level);
  }
  Report report;
  check_conversions(report, levels, share);
  check_middle(report, levels, seed, share);
  check_calls(report, levels, seed, share);
  report.settle();
  for (const auto& [name, ratio] : report.worst) printf("largest error over its bound: %s %.2f\n", name.c_str(), ratio);
  printf("levels:");
  for (const char* level : levels) printf(" %s", level);
  printf("\ncases %lld, calls %lld, results %lld, numbers %lld, failures %lld\n", (long long)report.cases, (long long)report.calls,
         (long long)report.results, (long long)report.numbers, (long long)report.failures);
  return report.failures ? 1 : 0;
}
