#include "call.h"

#include <functional>
#include <thread>

#include "tensor.h"

namespace native {
namespace {

using namespace coordatt;

void run_threads(int64_t count, int64_t chunks, void (*body)(void*, int64_t, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < chunks; ++i)
    threads.emplace_back([=] { body(context, count * i / chunks, count * (i + 1) / chunks); });
  for (std::thread& t : threads) t.join();
}
template <int N> void run_on(int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
  run_threads(count, count < N ? count : N, body, context);
}
Threads threads_of(int count) { return count == 1 ? Threads{1, nullptr} : count == 2 ? Threads{2, run_on<2>} : Threads{3, run_on<3>}; }

// [R, C] from and to the [C, R] of the reference; of: where row r lies.
using RowOf = std::function<int64_t(int64_t)>;
Numbers turned(const Memory& m, int64_t rows, int64_t columns, const RowOf& of) {
  Numbers v((size_t)(rows * columns));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) v[(size_t)(c * rows + r)] = m[of(r) * columns + c];
  return v;
}
Numbers turned_back(const Numbers& v, int64_t rows, int64_t columns, const RowOf& of) {
  Numbers to(v.size());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) to[(size_t)(of(r) * columns + c)] = v[(size_t)(c * rows + r)];
  return to;
}
int64_t same_row(int64_t r) { return r; }

Problem draw(const Case& c, uint64_t seed) {
  const Shape& s = c.shape;
  Random random(seed);
  Problem p;
  p.shape = s;
  p.norm = c.norm;
  p.activation = c.activation;
  p.skip = c.skip;
  auto numbers = [&](int64_t count, double scale, double offset = 0) {
    Numbers v((size_t)count);
    for (Number& n : v) n = rounded(offset + scale * random.normal(), c.params);
    return v;
  };
  p.conv1_weight = numbers(s.m * s.c, 1.2 / std::sqrt((double)s.c));
  p.conv_h_weight = numbers(s.c * s.m, 1.5 / std::sqrt((double)s.m));
  p.conv_w_weight = numbers(s.c * s.m, 1.5 / std::sqrt((double)s.m));
  if (c.bias) p.conv1_bias = numbers(s.m, 0.5), p.conv_h_bias = numbers(s.c, 0.5), p.conv_w_bias = numbers(s.c, 0.5);
  if (c.norm != Norm::none && c.affine) p.bn_weight = numbers(s.m, 0.4, 1), p.bn_bias = numbers(s.m, 0.7);
  if (c.norm == Norm::given) {
    p.mean = numbers(s.m, 0.5);
    p.var = numbers(s.m, 1);
    for (Number& v : p.var) v = rounded(0.5 + v * v, c.params);
  }
  p.before = c.before;
  p.before_activation = c.before_activation;
  Numbers offsets((size_t)s.c);  // a channel's, for its mean to matter
  if (c.before != Norm::none) {
    for (Number& v : offsets) v = random.normal();
    if (c.before_affine) p.before_weight = numbers(s.c, 0.5, 1.5), p.before_bias = numbers(s.c, 0.7, 0.7);
    if (c.before == Norm::given) {
      p.before_mean = numbers(s.c, 0.5);
      p.before_var = numbers(s.c, 1);
      for (Number& v : p.before_var) v = rounded(1 + 2 * v * v, c.params);
    }
  }
  // Noise and an offset per row and column, so that strips differ whatever their length; in the map's own strides, where
  // several elements may be one.
  auto map = [&](int64_t salt) {
    Numbers rows((size_t)(s.n * s.c * (s.h + s.w)));
    for (Number& v : rows) v = random.normal();
    Tensor t(c, true, salt);
    Numbers v((size_t)(s.n * s.c * s.h * s.w));
    for (int64_t i = 0; i < (int64_t)v.size(); ++i) {
      const int64_t plane = i / (s.h * s.w), h = i / s.w % s.h, w = i % s.w;
      const Number line = rows[(size_t)(plane * (s.h + s.w) + h)] + rows[(size_t)(plane * (s.h + s.w) + s.h + w)];
      v[(size_t)i] = rounded(random.normal() + line + (salt == 5 ? offsets[(size_t)(plane % s.c)] : 0), c.dtype);
    }
    if (c.special != 0) v[(size_t)random.below((int64_t)v.size())] = c.special;
    t.set(v);
    return t.values();
  };
  p.x = map(5);
  p.grad = map(6);
  return p;
}

class Run {
 public:
  Run(Report& report, const Case& c, const Problem& problem, const Yardstick& yard)
      : report_(report), c_(c), s_(c.shape), p_(problem), yard_(yard), acc_(acc_of(c.dtype)), rows_(c.shape.rows()),
        x_(c, true, 5), grad_(c, true, 6), w1_(problem.conv1_weight, c.params, true), b1_(problem.conv1_bias, c.params, false),
        gamma_(problem.bn_weight, c.params, true), beta_(problem.bn_bias, c.params, true), mean_(problem.mean, c.params, false),
        var_(problem.var, c.params, true), wh_(problem.conv_h_weight, c.params, false), bh_(problem.conv_h_bias, c.params, true),
        ww_(problem.conv_w_weight, c.params, true), bw_(problem.conv_w_bias, c.params, true),
        before_weight_(problem.before_weight, c.params, true), before_bias_(problem.before_bias, c.params, false),
        before_mean_(problem.before_mean, c.params, true), before_var_(problem.before_var, c.params, false) {
    x_.set(problem.x);
    grad_.set(problem.grad);
    (Call&)call_ = Call{s_, c.dtype, c.nhwc, c.norm, c.activation, c.skip, {}, {}};
    call_.params = {w1_.param(), b1_.param(), gamma_.param(), beta_.param(), mean_.param(), var_.param(),
                    wh_.param(), bh_.param(), ww_.param(), bw_.param(), problem.eps};
    call_.before = {c.before, c.before_activation, before_weight_.param(), before_bias_.param(), before_mean_.param(),
                    before_var_.param(), problem.before_eps};
  }

  void all() {
    const Threads threads = threads_of(c_.threads);
    const bool bare = c_.before == Norm::none;  // else only whole calls, of one process
    if (bare) pool_alone(threads), gate_alone(threads);
    if (c_.norm != Norm::batch && c_.before != Norm::batch) inference(threads);
    training(threads);
    if (bare && c_.norm == Norm::batch && c_.params == acc_) joined(threads);
    unchanged();
  }

 private:
  Report& report_;
  const Case& c_;
  const Shape& s_;
  const Problem& p_;
  const Yardstick& yard_;
  const DType acc_;
  const int64_t rows_;
  Tensor x_, grad_;
  Values w1_, b1_, gamma_, beta_, mean_, var_, wh_, bh_, ww_, bw_, before_weight_, before_bias_, before_mean_, before_var_;
  Call call_;

  void check(const char* name, const Numbers& values, DType type) { report_.check(name, values, type, acc_, yard_); }
  void check(const char* name, const Tensor& t) {
    check(name, t.values(), c_.dtype);
    report_.expect(t.intact(), std::string(name) + ": written beyond its elements");
  }
  void check_rows(const char* name, const Values& v, int64_t columns, const RowOf& of = same_row) {
    check(name, turned(v.memory, rows_, columns, of), acc_);
    report_.expect(v.memory.intact(), std::string(name) + ": written beyond its elements");
  }
  Numbers plain_values(const Memory& m) const {
    Numbers v((size_t)m.count());
    for (int64_t i = 0; i < m.count(); ++i) v[(size_t)i] = m[i];
    return v;
  }
  void check_vector(const char* name, const Values& v, DType type) {
    if (!v.memory.count()) return;
    report_.expect(v.memory.intact(), std::string(name) + ": written beyond its elements");
    check_values(name, plain_values(v.memory), type);
  }
  void check_dx(const Tensor& t) {
    check_values("dx", t.values(), c_.dtype);
    report_.expect(t.intact(), "dx: written beyond its elements");
  }
  void check_values(const char* name, const Numbers& v, DType type) {
    const bool batch = c_.norm == Norm::batch, cancels = batch && (s_.c == 1 || rows_ == 2);
    if (batch && !strcmp(name, "dconv1_bias")) return report_.check_zero(name, v);
    if (cancels && (!strcmp(name, "dconv1_weight") || (rows_ == 2 && !strcmp(name, "dx")))) return report_.check_vanishing(name, v, yard_);
    check(name, v, type);
  }
  // The pool and gate alone keep rows image by image.
  RowOf by_image() const {
    return [this](int64_t r) {
      const int64_t h_rows = s_.n * s_.h, length = s_.h + s_.w;
      return r < h_rows ? r / s_.h * length + r % s_.h : (r - h_rows) / s_.w * length + s_.h + (r - h_rows) % s_.w;
    };
  }

  void pool_alone(const Threads& threads) {
    Values pooled(rows_ * s_.c, acc_, true);
    PoolArgs a(call_);
    a.x = x_.map();
    a.pooled = pooled.data();
    pool(a, threads);
    check_rows("pooled", pooled, s_.c, by_image());
    Values back(turned_back(yard_.truth.at("dpooled").values, rows_, s_.c, by_image()), acc_, false);
    Tensor dx(c_, false, 7);
    a.x = dx.map();
    a.pooled = back.data();
    pool_backward(a, threads);
    check("dx of pool", dx);
    report_.calls += 2;
  }

  void gate_alone(const Threads& threads) {
    Values gates(turned_back(yard_.truth.at("gates").values, rows_, s_.c, same_row), acc_, true), dlogits(rows_ * s_.c, acc_, false);
    Tensor out(c_, false, 8), dx(c_, false, 9);
    GateArgs a(call_);
    a.x = x_.map();
    a.out = out.map();
    a.gates = gates.data();
    gate(a, threads);
    check("out", out);
    a.grad = grad_.map();
    a.out = dx.map();
    a.dlogits = dlogits.data();
    gate_backward(a, threads);
    check_rows("dlogits", dlogits, s_.c);
    check("dx of gate", dx);
    report_.calls += 2;
  }

  void inference(const Threads& threads) {
    Tensor out(c_, false, 7);
    ForwardArgs f(call_);
    f.x = x_.map();
    f.out = out.map();
    forward(f, threads);
    check("out", out);
    ++report_.calls;
    if (c_.spread == Spread::broadcast) return;
    Tensor both(c_, false, 5);  // in place
    both.set(p_.x);
    f.x = f.out = both.map();
    forward(f, threads);
    report_.expect(both.values() == out.values() || c_.special != 0, "out: not the same in place");
    check("out", both);
    ++report_.calls;
  }

  struct Kept {
    Values pooled, squeezed, gates, mean, var, before_mean, before_var;
    Kept(int64_t rows, const Shape& s, DType acc)
        : pooled(rows * s.c, acc, true), squeezed(rows * s.m, acc, false), gates(rows * s.c, acc, true), mean(s.m, acc, false),
          var(s.m, acc, true), before_mean(s.c, acc, true), before_var(s.c, acc, false) {}
    Saved saved() const {
      return {pooled.data(), squeezed.data(), gates.data(), mean.data(), var.data(), before_mean.data(), before_var.data()};
    }
  };
  struct Grads {
    Tensor dx;
    Values w1, b1, gamma, beta, wh, bh, ww, bw, before_weight, before_bias;
    Grads(const Case& c, const Problem& p, DType t)
        : dx(c, false, 8), w1((int64_t)p.conv1_weight.size(), t, true), b1((int64_t)p.conv1_bias.size(), t, true),
          gamma((int64_t)p.bn_weight.size(), t, false), beta((int64_t)p.bn_bias.size(), t, true),
          wh((int64_t)p.conv_h_weight.size(), t, true), bh((int64_t)p.conv_h_bias.size(), t, false),
          ww((int64_t)p.conv_w_weight.size(), t, false), bw((int64_t)p.conv_w_bias.size(), t, true),
          before_weight((int64_t)p.before_weight.size(), t, false), before_bias((int64_t)p.before_bias.size(), t, true) {}
    Gradients gradients() const {
      return {dx.map(), w1.param(), b1.param(), gamma.param(), beta.param(), wh.param(), bh.param(), ww.param(), bw.param(),
              before_weight.param(), before_bias.param()};
    }
    template <class F> void each(const F& f) const {
      f("dconv1_weight", w1), f("dconv1_bias", b1), f("dbn_weight", gamma), f("dbn_bias", beta);
      f("dconv_h_weight", wh), f("dconv_h_bias", bh), f("dconv_w_weight", ww), f("dconv_w_bias", bw);
      f("dbefore_weight", before_weight), f("dbefore_bias", before_bias);
    }
  };

  void training(const Threads& threads) {
    Kept kept(rows_, s_, acc_);
    Tensor out(c_, false, 9);
    ForwardArgs f(call_);
    f.x = x_.map();
    f.out = out.map();
    f.saved = kept.saved();
    forward(f, threads);
    check("out", out);
    check_rows("pooled", kept.pooled, s_.c);
    check_rows("squeezed", kept.squeezed, s_.m);
    check_rows("gates", kept.gates, s_.c);
    if (c_.norm == Norm::batch) check_vector("mean", kept.mean, acc_), check_vector("var", kept.var, acc_);
    if (c_.before == Norm::batch) check_vector("before_mean", kept.before_mean, acc_), check_vector("before_var", kept.before_var, acc_);
    Grads grads(c_, p_, c_.params);
    BackwardArgs b(call_);
    b.grad = grad_.map();
    b.x = x_.map();
    b.saved = kept.saved();
    b.out = grads.gradients();
    backward(b, threads);
    check_dx(grads.dx);
    grads.each([&](const char* name, const Values& v) { check_vector(name, v, c_.params); });
    report_.calls += 2;
    if (c_.threads == 1) return;
    Kept alone(rows_, s_, acc_);  // the same bits on one thread
    Tensor again(c_, false, 9);
    Grads others(c_, p_, c_.params);
    f.out = again.map();
    f.saved = b.saved = alone.saved();
    b.out = others.gradients();
    forward(f, threads_of(1));
    backward(b, threads_of(1));
    report_.calls += 2;
    auto same = [&](const char* name, const void* one, const void* other, int64_t bytes) {
      report_.expect(!memcmp(one, other, (size_t)bytes), std::string(name) + ": other bits on one thread");
    };
    same("gates", kept.gates.data(), alone.gates.data(), rows_ * s_.c * bytes_of(acc_));
    same("before_mean", kept.before_mean.data(), alone.before_mean.data(), s_.c * bytes_of(acc_));
    same("before_var", kept.before_var.data(), alone.before_var.data(), s_.c * bytes_of(acc_));
    report_.expect(out.values() == again.values() || c_.special != 0, "out: other bits on one thread");
    report_.expect(grads.dx.values() == others.dx.values() || c_.special != 0, "dx: other bits on one thread");
    std::vector<const Values*> of_one;
    others.each([&](const char*, const Values& v) { of_one.push_back(&v); });
    size_t i = 0;
    grads.each([&](const char* name, const Values& v) {
      same(name, v.data(), of_one[i++]->data(), v.memory.count() * bytes_of(c_.params));
    });
  }

  // Two processes, each with some of the images: together they are the whole batch.
  void joined(const Threads& threads) {
    const int64_t m = s_.m, first = s_.n / 2, parts[2] = {first, s_.n - first}, width = 1 + 2 * m;
    Tensor out(c_, false, 10);
    Grads whole(c_, p_, acc_);
    Values moments(2 * width, DType::f64, true), sums(2 * 2 * m, DType::f64, false);
    ForwardArgs f[2] = {ForwardArgs(call_), ForwardArgs(call_)};
    BackwardArgs b[2] = {BackwardArgs(call_), BackwardArgs(call_)};
    std::vector<std::unique_ptr<Kept>> kept;
    std::vector<std::unique_ptr<Grads>> grads;
    std::vector<std::unique_ptr<Values>> middle;
    MixGradients of[2];
    auto piece = [&](Map map, int i) {
      map.data = (char*)map.data + (i ? first * map.image * bytes_of(c_.dtype) : 0);
      return map;
    };
    for (int i = 0; i < 2; ++i) {
      Shape part = s_;
      part.n = parts[i];
      kept.push_back(std::make_unique<Kept>(part.rows(), part, acc_));
      grads.push_back(std::make_unique<Grads>(c_, p_, acc_));
      f[i].shape = part;
      f[i].x = piece(x_.map(), i);
      f[i].out = piece(out.map(), i);
      f[i].saved = kept.back()->saved();
      forward_local(f[i], (double*)moments.data() + i * width, threads);
    }
    for (int i = 0; i < 2; ++i)
      report_.expect(forward_joined(f[i], (const double*)moments.data(), 2, threads) == rows_, "joined: another count of rows");
    check("out", out);
    check_vector("mean", kept[1]->mean, acc_);
    check_vector("var", kept[1]->var, acc_);
    for (int i = 0; i < 2; ++i) {
      const int64_t rows = f[i].shape.rows();
      for (int64_t columns : {s_.c, m, m}) middle.push_back(std::make_unique<Values>(rows * columns, acc_, columns == m));
      of[i] = {middle[(size_t)i * 3]->data(), middle[(size_t)i * 3 + 1]->data(), middle[(size_t)i * 3 + 2]->data()};
      b[i] = BackwardArgs(f[i]);
      b[i].grad = piece(grad_.map(), i);
      b[i].x = f[i].x;
      b[i].saved = f[i].saved;
      b[i].out = grads[(size_t)i]->gradients();
      b[i].out.dx = piece(whole.dx.map(), i);
      double* mine = (double*)sums.data() + i * 2 * m;
      if (parts[i]) backward_local(b[i], of[i], mine, threads);
      else std::fill(mine, mine + 2 * m, 0.0);
    }
    for (int i = 0; i < 2; ++i)
      backward_joined(b[i], of[i], (const double*)sums.data() + i * 2 * m, (const double*)sums.data(), 2, rows_, threads);
    check_dx(whole.dx);
    std::vector<const Values*> left;
    grads[0]->each([&](const char*, const Values& v) { left.push_back(&v); });
    size_t i = 0;
    grads[1]->each([&](const char* name, const Values& v) {
      const Values& other = *left[i++];
      if (!v.memory.count()) return;
      Numbers sum = plain_values(v.memory);
      for (int64_t j = 0; j < v.memory.count(); ++j) sum[(size_t)j] += other.memory[j];
      report_.expect(v.memory.intact() && other.memory.intact(), std::string(name) + ": written beyond its elements");
      check_values(name, sum, acc_);
    });
    for (const auto& v : middle) report_.expect(v->memory.intact(), "joined: the middle's gradients written beyond their elements");
    report_.expect(moments.memory.intact() && sums.memory.intact(), "joined: moments or sums written beyond their elements");
    report_.calls += 8;
  }

  // What is read stays as it was.
  void unchanged() {
    auto same = [](const Numbers& a, const Numbers& b) {
      for (size_t i = 0; i < a.size(); ++i)
        if (a[i] != b[i] && !(isnan(a[i]) && isnan(b[i]))) return false;
      return a.size() == b.size();
    };
    report_.expect(same(x_.values(), p_.x) && x_.intact(), "x was written to");
    report_.expect(same(grad_.values(), p_.grad) && grad_.intact(), "the gradient was written to");
    for (const Values* v : {&w1_, &b1_, &gamma_, &beta_, &mean_, &var_, &wh_, &bh_, &ww_, &bw_, &before_weight_, &before_bias_,
                            &before_mean_, &before_var_})
      report_.expect(v->memory.intact(), "a parameter's surroundings were written to");
  }
};

}  // namespace

std::string describe(const Case& c) {
  const char* norms[] = {"none", "given", "batch"};
  const char* names[] = {"hard_swish", "silu", "relu", "relu6"};
  const char* spreads[] = {"dense", "gaps", "far", "broadcast"};
  char text[300], before[60] = "";
  if (c.before != Norm::none)
    snprintf(before, sizeof before, " before: %s%s %s", norms[(int)c.before], c.before_affine ? "" : " not affine",
             c.before_activation == no_activation ? "none" : names[c.before_activation]);
  snprintf(text, sizeof text, "%lldx%lldx%lldx%lld mid %lld %s %s params %s norm %s %s%s%s%s %s threads %d%s%s", (long long)c.shape.n,
           (long long)c.shape.c, (long long)c.shape.h, (long long)c.shape.w, (long long)c.shape.m, name_of(c.dtype),
           c.nhwc ? "nhwc" : "nchw", name_of(c.params), norms[(int)c.norm], names[(int)c.activation], c.skip ? " skip" : "",
           c.bias ? "" : " no bias", c.affine ? "" : " not affine", spreads[(int)c.spread], c.threads,
           c.special != 0 ? " not finite" : "", before);
  return text;
}

constexpr uint64_t most_attempts = 500;  // at the largest maps one draw in ten is clear

void run_case(Report& report, const Levels& levels, const Case& c, uint64_t seed) {
  const DType acc = acc_of(c.dtype);
  const double clear = acc == DType::f64 ? 1e-12 : 1e-5;
  std::vector<Problem> problems;
  std::vector<Yardstick> yards;
  std::map<std::string, Errors> plain, moves;
  for (uint64_t attempt = 0; (int)problems.size() < draws; ++attempt) {
    if (attempt == most_attempts) return report.fail(describe(c) + ": every draw has a value on a jump");
    Problem problem = draw(c, seed + (attempt << 32));
    Yardstick yard = yardstick(problem, acc, clear);
    // Where rounding could move a value across a jump of an activation's slope, it is drawn again.
    if (yard.nearest_jump < clear) continue;
    for (const auto& [name, errors] : yard.plain) plain[name].widen(errors);
    for (const auto& [name, errors] : yard.moves) moves[name].widen(errors);
    problems.push_back(std::move(problem));
    yards.push_back(std::move(yard));
  }
  report.special = c.special != 0;
  for (size_t i = 0; i < problems.size(); ++i) {
    yards[i].plain = plain;
    yards[i].moves = moves;
    for (size_t l = 0; l < levels.size(); ++l) {
      if (levels.size() > 1 && l % problems.size() != i) continue;  // several levels: a draw each
      report.where = describe(c) + " at " + levels[l];
      report.level = levels[l];
      set_level(levels[l]);
      Run(report, c, problems[i], yards[i]).all();
    }
  }
  ++report.cases;
}

}  // namespace native
