// The project's tolerance (tests/tolerances.py) where there is no PyTorch. The error against the truth may be at most
//
//     factor x (the error of the same formulas in the accumulate type)  +  1 ulp
//
// in three measures: root mean square over that of the truth, largest over largest, and each element's over |truth| + mean
// |truth| of its slice. The truth comes from Reference in double (long double where the case itself is float64), the yardstick
// from Reference in the accumulate type, which is what plain PyTorch computes with there: the largest over three orders of
// summation and four draws of the numbers; results of few numbers may also be off by what the truth moves by where every
// input is off by up to half an ulp. The first measure has the factor of the promise (docs/numerics.md), 2, over all cases of
// a type and result together. The others have 8 in every case: twice that of tolerances.py, as there are four draws in place
// of up to twelve, and the largest of a few rounding errors is luck. A wrong element is off by 1000 times and more.
//
// Half-precision results are rounded once, at the end, so that each must lie between the roundings of truth - bound and
// truth + bound of the accumulate type: at most the neighbouring number, and that only beside a tie.
#pragma once

#include <stdio.h>

#include "reference.h"

namespace native {

constexpr Number norm_factor = 2, element_factor = 8, floor_ulps = 1;
constexpr Number vanishes = 1.0 / 256;  // of the gradient of x: what batch normalisation cancels down to its eps
constexpr int64_t few = 256;
constexpr int orders = 3, shakes = 3, draws = 4;

struct Errors {
  Number norm = 0, tensor = 0, local = 0;
  void add(const Errors& e) { norm += e.norm, tensor += e.tensor, local += e.local; }
  void widen(const Errors& e) {
    norm = std::max(norm, e.norm);
    tensor = std::max(tensor, e.tensor);
    local = std::max(local, e.local);
  }
};

inline Numbers slice_means(const Result& truth) {
  Numbers means;
  for (size_t first = 0; first < truth.values.size(); first += (size_t)truth.slice) {
    Number total = 0, finite = 0;
    for (int64_t i = 0; i < truth.slice; ++i) {
      const Number size = fabs(truth.values[first + (size_t)i]);
      if (isfinite(size)) total += size, finite += 1;
    }
    means.push_back(total / std::max(finite, 1.0));
  }
  return means;
}

inline Errors errors(const Numbers& values, const Result& truth) {
  const Numbers means = slice_means(truth);
  Number square = 0, truth_square = 0, largest = 0, truth_largest = 0, local = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const Number t = truth.values[i];
    if (!isfinite(t)) continue;
    Number wrong = fabs(values[i] - t - (truth.rest.empty() ? 0 : truth.rest[i])), scale = fabs(t) + means[i / (size_t)truth.slice];
    if (!(wrong <= INFINITY)) wrong = INFINITY;
    square += wrong * wrong;
    truth_square += t * t;
    largest = std::max(largest, wrong);
    truth_largest = std::max(truth_largest, fabs(t));
    local = std::max(local, wrong / std::max(scale, (Number)2.3e-308));
  }
  if (truth_largest == 0) return {largest, largest, largest};  // zero by algebra: no scale to relate errors to
  return {sqrt(square / truth_square), largest / truth_largest, local};
}

// The truth of a call, and the errors that its results may have as multiples of.
struct Yardstick {
  Results truth;
  std::map<std::string, Errors> plain, moves;
  double nearest_jump;
};

// clear: how far from a jump the values must be; where they are not, the truth alone.
template <class True, class Plain> Yardstick yardstick_as(const Problem& problem, DType acc, double clear) {
  Reference<True> truth(problem);
  Yardstick yard{truth.results, {}, {}, truth.nearest_jump};
  if (yard.nearest_jump < clear) return yard;
  auto widen = [&](std::map<std::string, Errors>& of, const Results& others, int64_t most) {
    for (const auto& [name, other] : others)
      if ((int64_t)other.values.size() <= most) of[name].widen(errors(other.values, yard.truth[name]));
  };
  for (int order = 0; order < orders; ++order) widen(yard.plain, Reference<Plain>(problem, order).results, INT64_MAX);
  for (int shake = 1; shake <= shakes; ++shake) widen(yard.moves, Reference<True>(problem, 0, (uint64_t)shake, acc).results, few);
  return yard;
}

inline Yardstick yardstick(const Problem& problem, DType acc, double clear) {
  return acc == DType::f64 ? yardstick_as<long double, double>(problem, acc, clear) : yardstick_as<double, float>(problem, acc, clear);
}

// Counts what was compared and prints what failed, under the name of the case at hand.
class Report {
 public:
  std::string where, level;
  bool special = false;  // something in this case is not finite
  int64_t cases = 0, calls = 0, results = 0, numbers = 0, failures = 0;
  std::map<std::string, Number> worst;  // error over what is allowed, by type

  void fail(const std::string& what) {
    if (++failures <= 40) printf("FAILED %s: %s\n", where.c_str(), what.c_str());
  }
  void expect(bool condition, const std::string& what) {
    if (!condition) fail(what);
  }

  void check(const char* name, const Numbers& values, DType type, DType acc, const Yardstick& yard) {
    const Result& truth = yard.truth.at(name);
    const Errors ours = errors(values, truth);
    Errors plain = yard.plain.at(name);
    if (const auto moves = yard.moves.find(name); moves != yard.moves.end()) plain.add(moves->second);
    ++results;
    numbers += (int64_t)values.size();
    if (values.size() != truth.values.size()) return fail(std::string(name) + ": wrong count");
    const Number relative = element_factor * plain.local + floor_ulps * eps_of(acc);
    if (type == acc && !special) {
      const Number floor = floor_ulps * eps_of(type);
      allow(name, "tensor", ours.tensor, element_factor * plain.tensor + floor, type);
      allow(name, "local", ours.local, relative, type);
      Sums& of = sums_[std::string(name) + " [" + name_of(type) + "] at " + level];
      const Number allowed = norm_factor * plain.norm + floor;
      of.error += ours.norm * ours.norm;
      of.allowed += allowed * allowed;
    }
    const Numbers means = slice_means(truth);
    for (size_t i = 0; i < values.size(); ++i) {
      const Number t = truth.values[i], v = values[i], mean = means[i / (size_t)truth.slice];
      // Infinities leave gates at 0 and 1, whose slopes double and float do not round alike.
      const Number bound = special ? (fabs(t) + mean + 1) / 64 : relative * (fabs(t) + mean);
      const bool right = isnan(t)         ? isnan(v)
                         : isinf(t)       ? v == t
                         : type == acc    ? (special ? fabs(v - t) <= bound : isfinite(v))
                                          : v >= rounded(t - bound, type) && v <= rounded(t + bound, type);
      if (right) continue;
      char text[160];
      snprintf(text, sizeof text, "%s [%s]: element %lld is %.9g, truth %.9g +- %.3g", name, name_of(type), (long long)i, v, t,
               bound);
      return fail(text);
    }
  }

  // Zero in every number.
  void check_zero(const char* name, const Numbers& values) {
    ++results;
    for (Number v : values)
      if (v != 0) return fail(std::string(name) + ": must be exactly zero");
  }

  // Too small to matter beside the gradient of x.
  void check_vanishing(const char* name, const Numbers& values, const Yardstick& yard) {
    ++results;
    Number scale = 0;
    for (Number v : yard.truth.at("dx").values) scale = std::max(scale, fabs(v));
    const Numbers& truth = yard.truth.at(name).values;
    for (size_t i = 0; i < values.size(); ++i)
      if (!(fabs(values[i] - truth[i]) <= vanishes * scale)) return fail(std::string(name) + ": must vanish");
  }

  // The promise, once all cases are through.
  void settle() {
    for (const auto& [name, of] : sums_) {
      where = name;
      allow("all cases", "norm", sqrt(of.error), sqrt(of.allowed), name.find("float64") == std::string::npos ? DType::f32 : DType::f64);
    }
  }

 private:
  struct Sums {
    Number error = 0, allowed = 0;
  };
  std::map<std::string, Sums> sums_;

  void allow(const char* name, const char* measure, Number error, Number bound, DType type) {
    Number& of = worst[name_of(type) + std::string(" ") + measure];
    of = std::max(of, error / bound);
    if (error <= bound) return;
    char text[160];
    snprintf(text, sizeof text, "%s [%s, %s]: error %.3g = %.1f ulp, allowed %.3g", name, name_of(type), measure, error,
             error / eps_of(type), bound);
    fail(text);
  }
};

}  // namespace native
