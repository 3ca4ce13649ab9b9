#include "memory.h"
#include "parts.h"

namespace native {
namespace {

using namespace coordatt;

// One kernel's result beside its truth: off by at most so many roundings of the sizes it is made of.
class Middle {
 public:
  Middle(Report& report, const MixKernels& k, DType t, uint64_t seed) : report_(report), k_(k), t_(t), random_(seed) {}

  void all() {
    for (int64_t n : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33}) {
      dot(n, 5, 3), dot(4, n, 3), dot(3, 2, n);
      axpy(n, 2, 3), axpy(2, n, 5), axpy(3, 3, n);
      for (Activation a : {Activation::hard_swish, Activation::silu, Activation::relu, Activation::relu6}) act(n, 3, a), act(2, n, a);
      normalise(n, 3), normalise(3, n);
      sum_rows(n, 3), sum_rows(300, n), transpose(n, 3), transpose(3, n), transpose(n, n);
    }
    sigmoids();
  }

 private:
  Report& report_;
  const MixKernels& k_;
  const DType t_;
  Random random_;
  int64_t turn_ = 0;

  std::unique_ptr<Memory> numbers(int64_t count) {
    auto m = empty(count);
    for (int64_t i = 0; i < count; ++i) m->set(i, random_.normal());
    return m;
  }
  std::unique_ptr<Memory> empty(int64_t count) {
    ++turn_;
    return std::make_unique<Memory>(count, t_, turn_ % 2, turn_ % 3);
  }

  void close(const char* name, Number value, Number truth, Number size, Number roundings) {
    ++report_.numbers;
    if (fabs(value - truth) <= roundings * eps_of(t_) * size) return;
    char text[160];
    snprintf(text, sizeof text, "%s [%s]: %.9g, truth %.9g", name, name_of(t_), value, truth);
    report_.fail(text);
  }
  // columns of ld are the kernel's, the rest nobody's.
  void kept_between(const char* name, const Memory& m, int64_t rows, int64_t first, int64_t last, int64_t ld) {
    ++report_.calls;
    bool right = m.intact();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < ld && r * ld + c < m.count(); ++c) right = right && ((c >= first && c < last) || m.untouched(r * ld + c));
    report_.expect(right, std::string(name) + " [" + name_of(t_) + "]: written beyond its elements");
  }

  void dot(int64_t rows, int64_t cols, int64_t depth) {
    const int64_t lda = depth + 1, ldb = depth + 2, ldo = cols + 3;
    auto a = numbers((rows - 1) * lda + depth), b = numbers((cols - 1) * ldb + depth), bias = numbers(cols);
    auto out = empty((rows - 1) * ldo + cols);
    k_.dot({a->data(), lda, b->data(), ldb, rows % 2 ? bias->data() : nullptr, out->data(), ldo, rows, cols, depth});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t m = 0; m < cols; ++m) {
        long double truth = rows % 2 ? (*bias)[m] : 0, size = fabsl(truth);
        for (int64_t c = 0; c < depth; ++c) {
          const long double term = (long double)(*a)[r * lda + c] * (*b)[m * ldb + c];
          truth += term, size += fabsl(term);
        }
        close("dot", (*out)[r * ldo + m], (Number)truth, (Number)size, (Number)depth + 2);
      }
    kept_between("dot", *out, rows, 0, cols, ldo);
  }

  void axpy(int64_t rows, int64_t depth, int64_t channels) {
    const int64_t c0 = channels % 3, c1 = c0 + channels, ldb = c1 + 1, ldo = c1 + 2;
    const bool by_depth = rows % 2, accumulate = depth % 2, gated = channels % 2;
    const int64_t a_row = by_depth ? 1 : depth, a_depth = by_depth ? rows : 1;
    auto a = numbers(rows * depth), b = numbers((depth - 1) * ldb + c1), bias = numbers(c1), out = empty((rows - 1) * ldo + c1);
    Numbers start((size_t)out->count());
    for (int64_t r = 0; accumulate && r < rows; ++r)
      for (int64_t c = c0; c < c1; ++c) out->set(r * ldo + c, start[(size_t)(r * ldo + c)] = random_.uniform() > 0 ? 1 : -0.5);
    k_.axpy({a->data(), a_row, a_depth, b->data(), ldb, bias->data(), out->data(), ldo, rows, depth, c0, c1, gated, accumulate});
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = c0; c < c1; ++c) {
        long double truth = (long double)(*bias)[c] + start[(size_t)(r * ldo + c)], size = fabsl((*bias)[c]) + fabsl(start[(size_t)(r * ldo + c)]);
        for (int64_t k = 0; k < depth; ++k) {
          const long double term = (long double)(*a)[r * a_row + k * a_depth] * (*b)[k * ldb + c];
          truth += term, size += fabsl(term);
        }
        if (gated) truth = sigmoid(truth), size = size / 4 + 1;
        close("axpy", (*out)[r * ldo + c], (Number)truth, (Number)size, (Number)depth + 4);
      }
    kept_between("axpy", *out, rows, c0, c1, ldo);
  }

  void act(int64_t rows, int64_t m, Activation activation) {
    const int64_t count = rows * m;
    auto z = numbers(count), scale = numbers(m), shift = numbers(m), mean = numbers(m), dy = numbers(count), y = empty(count);
    Memory scratch(act_scratch_bytes(m) / 8, DType::f64, true), sums(2 * m, DType::f64, true);
    for (int64_t i = 0; i < 2 * m; ++i) sums.set(i, 1);
    Numbers given((size_t)count), du((size_t)(2 * m), 1), sizes((size_t)(2 * m), 1);
    for (int64_t i = 0; i < count; ++i) given[(size_t)i] = (*dy)[i];
    ActArgs a{z->data(), scale->data(), shift->data(), mean->data(), y->data(), nullptr, nullptr, nullptr, rows, m, activation, scratch.data()};
    auto compare = [&](const char* name, bool back) {
      for (int64_t i = 0; i < count; ++i) {
        const long double dev = (long double)(*z)[i] - (*mean)[i % m], u = dev * (*scale)[i % m] + (*shift)[i % m];
        const Number size = 1 + fabs((*z)[i]) + fabs((*mean)[i % m]), of = 1 + size * (1 + fabs((*scale)[i % m])) + fabs((*shift)[i % m]);
        close(name, (*y)[i], (Number)activate(activation, u), of * of, 8);
        for (double jump : jumps(activation)) if (fabsl(u - jump) < 1e-4) return;
        if (!back) continue;
        const Number truth = (Number)activate_backward(activation, u, (long double)given[(size_t)i]), large = of * of * fabs(given[(size_t)i]);
        close(name, (*dy)[i], truth, large, 8);
        du[(size_t)(i % m)] += truth, sizes[(size_t)(i % m)] += large;
        du[(size_t)(m + i % m)] += truth * (Number)dev, sizes[(size_t)(m + i % m)] += large * size;
      }
      for (int64_t i = 0; back && i < 2 * m; ++i) close(name, sums[i], du[(size_t)i], sizes[(size_t)i], 8 + (Number)rows);
      kept_between(name, *y, 1, 0, count, count);
      report_.expect(scratch.intact() && sums.intact() && dy->intact(), std::string(name) + ": written beyond its elements");
    };
    k_.act(a);
    compare("act", false);
    a.dy = dy->data();
    a.sum_du = (double*)sums.data();
    a.sum_du_dev = a.sum_du + m;
    k_.act_backward(a);
    compare("act_backward", true);
  }

  void normalise(int64_t rows, int64_t m) {
    auto z = numbers(rows * m), mean = empty(m), var = empty(m), du = numbers(rows * m), scale = numbers(m), offset = numbers(m), slope = numbers(m);
    Memory moments(2 * m, DType::f64, true);
    Numbers given;
    for (int64_t i = 0; i < rows * m; ++i) given.push_back((*du)[i]);
    NormArgs n{};
    n.z = z->data(), n.mean = mean->data(), n.var = var->data(), n.rows = rows, n.m = m;
    k_.stats(n);
    n.moments = (double*)moments.data();
    k_.stats(n);
    for (int64_t j = 0; j < m; ++j) {
      long double mu = 0, square = 0;
      for (int64_t r = 0; r < rows; ++r) mu += (*z)[r * m + j] / (long double)rows;
      for (int64_t r = 0; r < rows; ++r) square += ((*z)[r * m + j] - mu) * ((*z)[r * m + j] - mu);
      const Number of = t_ == DType::f64 ? (Number)rows + 2 : 1;  // summed in double
      close("stats", (*mean)[j], (Number)mu, 3, of), close("stats", (*var)[j], (Number)square / (Number)rows, 36, of);
      close("stats", moments[j], (Number)mu, 3, of), close("stats", moments[m + j], (Number)square, 36 * (Number)rows, of);
    }
    kept_between("stats", *mean, 1, 0, m, m), kept_between("stats", *var, 1, 0, m, m);
    n.du = du->data(), n.scale = scale->data();
    if (rows % 2) n.offset = offset->data(), n.slope = slope->data();
    k_.norm_backward(n);
    for (int64_t i = 0; i < rows * m; ++i) {
      const int64_t j = i % m;
      long double truth = given[(size_t)i];
      if (rows % 2) truth = truth - (*offset)[j] - ((long double)(*z)[i] - (*mean)[j]) * (*slope)[j];
      truth *= (*scale)[j];
      close("norm_backward", (*du)[i], (Number)truth, 30, 4);
    }
    kept_between("norm_backward", *du, 1, 0, rows * m, rows * m);
    report_.expect(moments.intact(), "stats: written beyond its elements");
  }

  void sum_rows(int64_t rows, int64_t channels) {
    const int64_t c0 = 1, c1 = 1 + channels, ld = c1 + 2;
    auto a = numbers((rows - 1) * ld + c1), out = empty(c1);
    k_.sum_rows(a->data(), ld, rows, c0, c1, out->data());
    for (int64_t c = c0; c < c1; ++c) {
      long double truth = 0, size = 0;
      for (int64_t r = 0; r < rows; ++r) truth += (*a)[r * ld + c], size += fabs((*a)[r * ld + c]);
      close("sum_rows", (*out)[c], (Number)truth, (Number)size, 32);
    }
    kept_between("sum_rows", *out, 1, c0, c1, c1);
  }

  void transpose(int64_t rows, int64_t cols) {
    const int64_t lda = cols + 1, ldo = rows + 2;
    auto a = numbers((rows - 1) * lda + cols), out = empty((cols - 1) * ldo + rows);
    k_.transpose(a->data(), lda, rows, cols, out->data(), ldo);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) close("transpose", (*out)[c * ldo + r], (*a)[r * lda + c], 0, 0);
    kept_between("transpose", *out, cols, 0, rows, ldo);
  }

  // Over the whole range, and where it ends: exactly 0 and 1 at the infinities.
  void sigmoids() {
    Numbers of = {INFINITY, -INFINITY, NAN, 0, -0.0, 1e30, -1e30, 88, -87, 89, -89, 104, -104, 710, -710, 750, -750};
    for (int64_t i = -4000; i <= 4000; ++i) of.push_back((Number)i / 37);
    Memory m((int64_t)of.size(), t_, true);
    for (size_t i = 0; i < of.size(); ++i) m.set((int64_t)i, of[i]);
    for (size_t i = 0; i < of.size(); ++i) of[i] = m[(int64_t)i];
    k_.sigmoid(m.data(), m.count());
    for (size_t i = 0; i < of.size(); ++i) {
      const Number truth = (Number)sigmoid((long double)of[i]), value = m[(int64_t)i];
      if (isnan(truth) || isinf(of[i])) report_.expect(isnan(truth) ? isnan(value) : value == truth, "sigmoid of what is not finite");
      else close("sigmoid", value, truth, fabs(truth) + ldexp(1, lowest_of(t_)) / eps_of(t_), 4);
    }
    kept_between("sigmoid", m, 1, 0, m.count(), m.count());
  }
};

}  // namespace

void check_middle(Report& report, const Levels& levels, uint64_t seed, Share& share) {
  for (const char* level : levels)
    for (DType t : {DType::f32, DType::f64}) {
      if (!share.mine()) continue;
      report.where = std::string("the middle's kernels at ") + level;
      set_level(level);
      Middle(report, kernels().mix[t == DType::f64], t, seed + 1).all();
      ++report.cases;
    }
}

}  // namespace native
