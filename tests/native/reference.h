// The function and its derivatives as scalar loops, in an arithmetic type of choice and an order of summation of choice.
#pragma once

#include <algorithm>
#include <map>
#include <string>

#include "numbers.h"

namespace native {

using coordatt::Activation;
using coordatt::Norm;
using coordatt::Shape;

// What one call is given, maps as dense [N, C, H, W]; an absent parameter is empty.
struct Problem {
  Shape shape{};
  Norm norm = Norm::given;
  Activation activation = Activation::hard_swish;
  bool skip = false;
  double eps = 1e-5;
  Norm before = Norm::none;  // what stands before the block
  int before_activation = coordatt::no_activation;
  double before_eps = 1e-3;
  Numbers before_weight, before_bias, before_mean, before_var;
  Numbers x, grad, conv1_weight, conv1_bias, bn_weight, bn_bias, mean, var, conv_h_weight, conv_h_bias, conv_w_weight, conv_w_bias;
};

// One result and the length of its slices (tests/tolerances.py): a channel of an image, an output channel, all of a vector.
struct Result {
  Numbers values, rest;  // rest: what the values lack of long double's
  int64_t slice;
};
using Results = std::map<std::string, Result>;

// Where the activation's slope jumps: there rounding decides.
inline std::vector<double> jumps(Activation a) {
  if (a == Activation::hard_swish) return {-3, 3};
  if (a == Activation::relu) return {0};
  if (a == Activation::relu6) return {0, 6};
  return {};
}

template <class T> T sigmoid(T v) { return 1 / (1 + std::exp(-v)); }

template <class T> T activate(Activation a, T u) {
  auto clamp = [](T v) { return v < 0 ? T(0) : v > 6 ? T(6) : v; };
  if (a == Activation::hard_swish) return u * clamp(u + 3) / 6;
  if (a == Activation::silu) return u * sigmoid(u);
  if (a == Activation::relu) return u < 0 ? T(0) : u;
  return clamp(u);
}

// dy times the slope; a gradient ends where that is zero, also a NaN (docs/numerics.md).
template <class T> T activate_backward(Activation a, T u, T dy) {
  if (a == Activation::hard_swish) return u <= -3 ? T(0) : u >= 3 ? dy : dy * (u / 3 + T(0.5));
  if (a == Activation::silu) return dy * (sigmoid(u) * (1 + u * (1 - sigmoid(u))));
  if (a == Activation::relu) return u <= 0 ? T(0) : dy;
  return u > 0 && u < 6 ? dy : T(0);
}

template <class T> struct Wider { using type = double; };  // what statistics are summed in
template <> struct Wider<long double> { using type = long double; };

// order: 0 as they come, 1 from the end, 2 from a third on; in halves down to eight, as PyTorch's own sums are blocked.
template <class T, class F> T sum(int64_t count, int order, const F& term) {
  auto at = [&](int64_t i) { return term(order == 0 ? i : order == 1 ? count - 1 - i : (i + count / 3) % count); };
  struct {
    decltype(at)& of;
    T operator()(int64_t begin, int64_t end) const {
      if (end - begin > 8) return (*this)(begin, (begin + end) / 2) + (*this)((begin + end) / 2, end);
      T total = 0;
      for (int64_t i = begin; i < end; ++i) total += (T)of(i);
      return total;
    }
  } halves{at};
  return halves(0, count);
}

template <class T> class Reference {
 public:
  // shake: other than zero moves every input by up to half an ulp of `ulp`'s type.
  explicit Reference(const Problem& p, int order = 0, uint64_t shake = 0, DType ulp = DType::f32)
      : p_(p), s_(p.shape), rows_(p.shape.rows()), order_(order), shake_(shake), ulp_(ulp) {
    x = take(p.x);
    w1 = take(p.conv1_weight);
    wh = take(p.conv_h_weight);
    ww = take(p.conv_w_weight);
    gamma = take(p.bn_weight);
    if (p.before != Norm::none) before();
    forward();
    if (!p.grad.empty()) backward();
  }

  Results results;
  double nearest_jump = INFINITY;

 private:
  using W = typename Wider<T>::type;
  using Values = std::vector<T>;
  const Problem& p_;
  const Shape& s_;
  const int64_t rows_;
  const int order_;
  const uint64_t shake_;
  const DType ulp_;
  Values x, w1, wh, ww, gamma, inv, u, y, z, zhat, p, gates;  // p, gates: [C, R]; z, zhat, u, y: [M, R]
  struct {
    Values x, u, weight, mean, inv, scale;  // x: as it is given, where x above is the map that is made of it
  } ahead;

  Values take(const Numbers& from) const {
    Values to(from.begin(), from.end());
    Random random(shake_ + from.size());
    if (shake_)
      for (T& v : to) v *= 1 + (T)(random.uniform() * eps_of(ulp_) / 2);
    return to;
  }
  void keep(const char* name, const Values& v, int64_t slice) {
    Result& r = results[name];
    r = {Numbers(v.begin(), v.end()), {}, slice};
    if constexpr (sizeof(T) > sizeof(double))
      for (size_t i = 0; i < v.size(); ++i) r.rest.push_back((double)(v[i] - (T)r.values[i]));
  }
  template <class F> T total(int64_t count, const F& term) const { return sum<T>(count, order_, term); }

  int64_t map(int64_t n, int64_t c, int64_t h, int64_t w) const { return ((n * s_.c + c) * s_.h + h) * s_.w + w; }
  int64_t row_h(int64_t n, int64_t h) const { return n * s_.h + h; }
  int64_t row_w(int64_t n, int64_t w) const { return s_.n * s_.h + n * s_.w + w; }
  bool is_h(int64_t r) const { return r < s_.n * s_.h; }
  int64_t plane() const { return s_.h * s_.w > 1 ? s_.h * s_.w : s_.n * s_.c; }
  template <class F> void each_map(const F& f) const {
    for (int64_t n = 0; n < s_.n; ++n)
      for (int64_t c = 0; c < s_.c; ++c)
        for (int64_t h = 0; h < s_.h; ++h)
          for (int64_t w = 0; w < s_.w; ++w) f(map(n, c, h, w), c * rows_ + row_h(n, h), c * rows_ + row_w(n, w));
  }
  // out[c, r]: over h or w of the row's image.
  template <class F> void each_row(const F& f) const {
    for (int64_t c = 0; c < s_.c; ++c)
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t n = is_h(r) ? r / s_.h : (r - s_.n * s_.h) / s_.w, i = is_h(r) ? r % s_.h : (r - s_.n * s_.h) % s_.w;
        f(c, r, n, i);
      }
  }

  // A channel's element i, of N * H * W.
  int64_t of_channel(int64_t c, int64_t i) const {
    const int64_t size = s_.h * s_.w;
    return (i / size * s_.c + c) * size + i % size;
  }

  // x becomes act(scale x + shift), in PyTorch's order.
  void before() {
    const int64_t count = s_.n * s_.h * s_.w;
    ahead.x = x, ahead.u.resize(x.size()), ahead.weight = take(p_.before_weight);
    ahead.mean = take(p_.before_mean), ahead.inv = ahead.scale = Values(s_.c);
    Values bias = take(p_.before_bias), var = take(p_.before_var);
    if (p_.before == Norm::batch) ahead.mean = var = Values(s_.c);
    for (int64_t c = 0; c < s_.c; ++c) {
      auto at = [&](int64_t i) { return ahead.x[of_channel(c, i)]; };
      T& mean = ahead.mean[c];
      if (p_.before == Norm::batch) {
        const W mu = sum<W>(count, order_, [&](int64_t i) { return (W)at(i); }) / (W)count;
        mean = (T)mu;
        var[c] = (T)(sum<W>(count, order_, [&](int64_t i) { return (at(i) - mu) * (at(i) - mu); }) / (W)count);
      }
      ahead.inv[c] = 1 / std::sqrt(var[c] + (T)p_.before_eps);
      const T scale = ahead.scale[c] = ahead.weight.empty() ? ahead.inv[c] : ahead.weight[c] * ahead.inv[c];
      const T shift = (bias.empty() ? T(0) : bias[c]) - mean * scale;
      for (int64_t k = 0; k < count; ++k) {
        const int64_t i = of_channel(c, k);
        x[i] = ahead.u[i] = ahead.x[i] * scale + shift;
        if (p_.before_activation == coordatt::no_activation) continue;
        const Activation act = (Activation)p_.before_activation;
        x[i] = activate(act, ahead.u[i]);
        for (double jump : jumps(act)) nearest_jump = std::min(nearest_jump, (double)std::abs(ahead.u[i] - (T)jump));
      }
    }
    if (p_.before == Norm::batch) keep("before_mean", ahead.mean, s_.c), keep("before_var", var, s_.c);
  }

  // d, what comes back to the map, becomes the gradient of x as it is given.
  void before_backward(Values& d) {
    const int64_t count = s_.n * s_.h * s_.w;
    Values dweight(s_.c), dbias(s_.c);
    for (int64_t c = 0; c < s_.c; ++c) {
      auto dev = [&](int64_t i) { return ahead.x[of_channel(c, i)] - ahead.mean[c]; };
      for (int64_t k = 0; k < count && p_.before_activation != coordatt::no_activation; ++k) {
        const int64_t i = of_channel(c, k);
        d[i] = activate_backward((Activation)p_.before_activation, ahead.u[i], d[i]);
      }
      const T inv = ahead.inv[c], sum_du = dbias[c] = (T)sum<W>(count, order_, [&](int64_t i) { return d[of_channel(c, i)]; });
      const T sum_dev = (T)sum<W>(count, order_, [&](int64_t i) { return d[of_channel(c, i)] * dev(i); });
      dweight[c] = sum_dev * inv;
      for (int64_t k = 0; k < count; ++k) {
        T& of = d[of_channel(c, k)];
        if (p_.before == Norm::batch) of = of - sum_du / (T)count - dev(k) * (inv * inv * sum_dev / (T)count);
        of *= ahead.scale[c];
      }
    }
    if (!ahead.weight.empty()) keep("dbefore_weight", dweight, s_.c), keep("dbefore_bias", dbias, s_.c);
  }

  void forward() {
    const int64_t c = s_.c, m = s_.m, height = s_.h, width = s_.w;
    p.resize(c * rows_);
    each_row([&](int64_t ch, int64_t r, int64_t n, int64_t i) {
      p[ch * rows_ + r] = is_h(r) ? total(width, [&](int64_t w) { return x[map(n, ch, i, w)]; }) / (T)width
                                  : total(height, [&](int64_t h) { return x[map(n, ch, h, i)]; }) / (T)height;
    });
    z.resize(m * rows_), u = y = zhat = z, inv.assign(m, 1);
    Values mean(m), var(m), b1 = take(p_.conv1_bias), beta = take(p_.bn_bias);
    if (p_.norm == Norm::given) mean = take(p_.mean), var = take(p_.var);
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t r = 0; r < rows_; ++r)
        z[j * rows_ + r] = total(c, [&](int64_t k) { return w1[j * c + k] * p[k * rows_ + r]; }) + (b1.empty() ? T(0) : b1[j]);
      if (p_.norm == Norm::batch) {
        const T* of = &z[j * rows_];
        const W mu = sum<W>(rows_, order_, [&](int64_t r) { return (W)of[r]; }) / (W)rows_;
        mean[j] = (T)mu;
        var[j] = (T)(sum<W>(rows_, order_, [&](int64_t r) { return (of[r] - mu) * (of[r] - mu); }) / (W)rows_);
      }
      if (p_.norm != Norm::none) inv[j] = 1 / std::sqrt(var[j] + (T)p_.eps);
      for (int64_t i = j * rows_; i < (j + 1) * rows_; ++i) {
        zhat[i] = (z[i] - mean[j]) * inv[j];
        u[i] = p_.norm == Norm::none ? z[i] : gamma.empty() ? zhat[i] : zhat[i] * gamma[j] + beta[j];
        y[i] = activate(p_.activation, u[i]);
        for (double jump : jumps(p_.activation)) nearest_jump = std::min(nearest_jump, (double)std::abs(u[i] - (T)jump));
      }
    }
    gates.resize(c * rows_);
    Values bh = take(p_.conv_h_bias), bw = take(p_.conv_w_bias), out(x.size());
    each_row([&](int64_t ch, int64_t r, int64_t, int64_t) {
      const Values &weight = is_h(r) ? wh : ww, &bias = is_h(r) ? bh : bw;
      T logit = total(m, [&](int64_t k) { return weight[ch * m + k] * y[k * rows_ + r]; });
      gates[ch * rows_ + r] = sigmoid(logit + (bias.empty() ? T(0) : bias[ch]));
    });
    each_map([&](int64_t i, int64_t h, int64_t w) { out[i] = x[i] * gates[w] * gates[h] + (p_.skip ? x[i] : T(0)); });
    keep("pooled", p, rows_);
    keep("squeezed", z, rows_);
    if (p_.norm == Norm::batch) keep("mean", mean, m), keep("var", var, m);
    keep("gates", gates, rows_);
    keep("out", out, plane());
  }

  void backward() {
    const int64_t c = s_.c, m = s_.m, h_rows = s_.n * s_.h;
    const Values g = take(p_.grad);
    Values ds(c * rows_), dwh(c * m), dww(c * m), dbh(c), dbw(c), dz(m * rows_), dw1(m * c), db1(m), dgamma(m), dbeta(m);
    Values dp(c * rows_), dx(x.size()), dx_gate(x.size()), dx_pool(x.size());
    each_row([&](int64_t ch, int64_t r, int64_t n, int64_t i) {
      const T* a = &gates[ch * rows_];
      auto along_w = [&](int64_t w) { return g[map(n, ch, i, w)] * x[map(n, ch, i, w)] * a[row_w(n, w)]; };
      auto along_h = [&](int64_t h) { return g[map(n, ch, h, i)] * x[map(n, ch, h, i)] * a[row_h(n, h)]; };
      ds[ch * rows_ + r] = a[r] * (1 - a[r]) * (is_h(r) ? total(s_.w, along_w) : total(s_.h, along_h));
    });
    for (int64_t ch = 0; ch < c; ++ch) {
      const T *h = &ds[ch * rows_], *w = h + h_rows;
      dbh[ch] = total(h_rows, [&](int64_t r) { return h[r]; });
      dbw[ch] = total(rows_ - h_rows, [&](int64_t r) { return w[r]; });
      for (int64_t j = 0; j < m; ++j) {
        const T* of = &y[j * rows_];
        dwh[ch * m + j] = total(h_rows, [&](int64_t r) { return h[r] * of[r]; });
        dww[ch * m + j] = total(rows_ - h_rows, [&](int64_t r) { return w[r] * of[h_rows + r]; });
      }
    }
    for (int64_t j = 0; j < m; ++j) {
      T *du = &dz[j * rows_], *hat = &zhat[j * rows_];
      for (int64_t r = 0; r < rows_; ++r) {
        const Values& weight = is_h(r) ? wh : ww;
        du[r] = total(c, [&](int64_t k) { return ds[k * rows_ + r] * weight[k * m + j]; });
        du[r] = activate_backward(p_.activation, u[j * rows_ + r], du[r]);
      }
      const T sum_du = dbeta[j] = total(rows_, [&](int64_t r) { return du[r]; });
      const T sum_hat = dgamma[j] = total(rows_, [&](int64_t r) { return du[r] * hat[r]; });
      const T scale = p_.norm == Norm::none ? T(1) : gamma.empty() ? inv[j] : gamma[j] * inv[j];
      for (int64_t r = 0; r < rows_; ++r) {
        if (p_.norm == Norm::batch) du[r] = du[r] - sum_du / (T)rows_ - hat[r] * (sum_hat / (T)rows_);
        du[r] *= scale;
      }
      db1[j] = p_.norm == Norm::batch ? T(0) : total(rows_, [&](int64_t r) { return du[r]; });
      for (int64_t k = 0; k < c; ++k)
        dw1[j * c + k] = total(rows_, [&](int64_t r) { return du[r] * p[k * rows_ + r]; });
    }
    each_row([&](int64_t ch, int64_t r, int64_t, int64_t) {
      dp[ch * rows_ + r] = total(m, [&](int64_t j) { return w1[j * c + ch] * dz[j * rows_ + r]; });
    });
    each_map([&](int64_t i, int64_t h, int64_t w) {
      dx_gate[i] = g[i] * gates[w] * gates[h] + (p_.skip ? g[i] : T(0));
      dx_pool[i] = dp[h] / (T)s_.w + dp[w] / (T)s_.h;
      dx[i] = dx_gate[i] + dx_pool[i];
    });
    if (p_.before != Norm::none) before_backward(dx);
    keep("dlogits", ds, rows_);
    keep("dpooled", dp, rows_);
    keep("dx", dx, plane());
    keep("dx of gate", dx_gate, plane());
    keep("dx of pool", dx_pool, plane());
    keep("dconv1_weight", dw1, c);
    keep("dconv1_bias", db1, m);
    if (p_.norm != Norm::none && !gamma.empty()) keep("dbn_weight", dgamma, m), keep("dbn_bias", dbeta, m);
    keep("dconv_h_weight", dwh, m);
    keep("dconv_h_bias", dbh, c);
    keep("dconv_w_weight", dww, m);
    keep("dconv_w_bias", dbw, c);
  }
};

}  // namespace native
