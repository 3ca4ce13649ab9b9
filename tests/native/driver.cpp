// The CPU kernels without torch, against scalar loops: every pass, type, layout and tail, at every SIMD level that this
// build and this processor have.
//
//     driver [seed [share shares]]
//
// Prints what failed and, last, what was compared. Exits with 1 where anything failed, with 2 where memory beyond an end was
// touched.
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "parts.h"

using namespace native;

#if !defined(ON_HEAP)  // there AddressSanitizer says it
Report* running = nullptr;

void on_fault(int) {
  const std::string& where = running->where;
  if (write(1, "memory beyond an end was touched: ", 34) < 0 || write(1, where.data(), where.size()) < 0 || write(1, "\n", 1) < 0) _exit(3);
  _exit(2);
}
#endif

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
#if !defined(ON_HEAP)
  running = &report;
  signal(SIGSEGV, on_fault);
  signal(SIGBUS, on_fault);
#endif
  setvbuf(stdout, nullptr, _IOLBF, 0);
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
