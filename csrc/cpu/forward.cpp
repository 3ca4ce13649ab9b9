// Forward of a whole call: which pass runs on which piece, on which thread, in which order.
#include "middle.h"
#include "tuning.h"

namespace coordatt {
namespace {

const Threads one_thread = {1, nullptr};

// A call, and how its map is read.
struct Forward : ForwardArgs {
  explicit Forward(const ForwardArgs& args) : ForwardArgs(args) {}
  Ahead ahead;
};

void pool_piece(const Forward& f, const Kernels& k, const Piece& p, const AxisRows& pooled) {
  Scratch scratch(k.map[(int)f.dtype].plane_scratch(f.shape.h, f.shape.w, f.shape.c));
  PlaneArgs a = plane_args(f, p, scratch);
  a.x = start_of(p, f, f.x);
  a.x_step = f.x.step;
  a.pooled = pooled;
  a.before = f.ahead.args;
  k.map[(int)f.dtype].pool[f.ahead.read][f.nhwc](a);
}

// One axis' gates of one piece: sigmoid(conv(y)).
void expand(const Forward& f, const Kernels& k, const Piece& p, const void* y, int64_t rows, void* weight,
            const void* transposed, const void* bias, void* gates) {
  const MixKernels& mix = mix_of(k, f.dtype);
  int64_t m = f.shape.m, bytes = acc_bytes_of(f.dtype);
  AxpyArgs e{};
  e.a = y; e.a_row = m; e.a_depth = 1;
  e.bias = bias;
  e.out = gates; e.ldo = f.shape.c;
  e.rows = rows; e.depth = m;
  e.sigmoid = true;
  if (transposed) {
    e.b = transposed; e.ldb = f.shape.c;
    e.c0 = p.c0; e.c1 = p.c1;
    return mix.axpy(e);
  }
  constexpr int64_t panel = panel_channels;
  Scratch scratch(m * panel * bytes);
  char* turned = (char*)scratch.bytes(0);
  for (int64_t c = p.c0; c < p.c1; c += panel) {
    int64_t width = c + panel < p.c1 ? panel : p.c1 - c;
    mix.transpose(at(weight, c * m, bytes), m, width, m, turned, panel);
    e.b = turned; e.ldb = panel;
    e.bias = bias ? at((void*)bias, c, bytes) : nullptr;
    e.out = at(gates, c, bytes);
    e.c0 = 0; e.c1 = width;
    mix.axpy(e);
  }
}

// The middle's second half (y -> gates) and the gate.
void gate_map(const Forward& f, const Kernels& k, const Middle& middle, const Threads& threads, void* y, void* gates) {
  const Shape& s = f.shape;
  int64_t bytes = acc_bytes_of(f.dtype);
  auto form_gates = [&](const Piece& p) {
    AxisRows from = rows_of(p, y, s, s.m, bytes), to = rows_of(p, gates, s, s.c, bytes);
    expand(f, k, p, from.h, s.h, middle.conv_h, middle.expand_h, middle.bias_h, to.h);
    expand(f, k, p, from.w, s.w, middle.conv_w, middle.expand_w, middle.bias_w, to.w);
  };
  auto apply_gates = [&](const Piece& p) {
    Scratch scratch(k.map[(int)f.dtype].plane_scratch(s.h, s.w, s.c));
    PlaneArgs a = plane_args(f, p, scratch);
    a.x = start_of(p, f, f.x);
    a.x_step = f.x.step;
    a.out = start_of(p, f, f.out);
    a.out_step = f.out.step;
    a.gates = rows_of(p, gates, s, s.c, bytes);
    a.before = f.ahead.args;
    k.map[(int)f.dtype].gate[f.ahead.read][f.nhwc](a);
  };
  Pieces pieces(f, threads.count);
  const bool by_rows = pieces.cut() && whole_pixels_pay(f);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) {  // backwards: what was pooled last is still in cache
      form_gates(pieces[i]);
      if (!by_rows) apply_gates(pieces[i]);
    }
  });
  if (!by_rows) return;
  Pieces bands(f, threads.count, Pieces::rows);
  run(threads, bands.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) apply_gates(bands[i]);
  });
}

// squeezed[r] = conv1(pooled[r]) for all rows, and y = act(norm(squeezed)) if y is not null (y may be squeezed).
void squeeze(const Forward& f, const Kernels& k, const Middle& middle, const Threads& threads, const void* pooled,
             void* squeezed, void* y) {
  const MixKernels& mix = mix_of(k, f.dtype);
  int64_t bytes = acc_bytes_of(f.dtype), c = f.shape.c, m = f.shape.m, rows = f.shape.rows();
  Threads t = worth(threads, 0.08 * (double)(rows * c * m));
  run(t, (rows + squeeze_rows - 1) / squeeze_rows, [&](int64_t begin, int64_t end) {
    int64_t r0 = begin * squeeze_rows, r1 = end * squeeze_rows < rows ? end * squeeze_rows : rows;
    DotArgs d{};
    d.a = at((void*)pooled, r0 * c, bytes); d.lda = c;
    d.b = middle.conv1_weight; d.ldb = c;
    d.bias = middle.conv1_bias;
    d.out = at(squeezed, r0 * m, bytes); d.ldo = m;
    d.rows = r1 - r0; d.cols = m; d.depth = c;
    mix.dot(d);
    if (!y) return;
    Scratch scratch(act_scratch_bytes(m));
    ActArgs a{};
    a.z = d.out;
    a.y = at(y, r0 * m, bytes);
    a.scale = middle.scale;
    a.shift = middle.shift;
    a.mean = middle.mean;
    a.rows = r1 - r0;
    a.m = m;
    a.activation = f.activation;
    a.scratch = scratch.bytes(0);
    mix.act(a);
  });
}

// Images [first, first + count) of an inference call.
void infer(const Forward& all, const Kernels& k, const Middle& middle, const Threads& threads, int64_t first,
           int64_t count) {
  Forward f = all;
  int64_t size = bytes_of(f.dtype), bytes = acc_bytes_of(f.dtype);
  f.shape.n = count;
  f.x.data = at(f.x.data, first * f.x.image, size);
  f.out.data = at(f.out.data, first * f.out.image, size);
  const Shape& s = f.shape;
  Scratch scratch(Scratch::round(s.rows() * s.c * bytes) * 2 + Scratch::round(s.rows() * s.m * bytes));
  void* pooled = scratch.bytes(s.rows() * s.c * bytes);
  void* gates = scratch.bytes(s.rows() * s.c * bytes);
  void* y = scratch.bytes(s.rows() * s.m * bytes);
  Pieces pieces(f, threads.count);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_piece(f, k, pieces[i], rows_of(pieces[i], pooled, s, s.c, bytes));
  });
  squeeze(f, k, middle, threads, pooled, y, y);
  gate_map(f, k, middle, threads, y, gates);
}

// x -> saved.pooled and saved.squeezed; under batch statistics saved.mean and saved.var, or moments where it is not null.
void train_squeeze(const Forward& f, const Kernels& k, const Middle& middle, const Threads& threads, double* moments) {
  const Shape& s = f.shape;
  int64_t bytes = acc_bytes_of(f.dtype);
  Pieces pieces(f, threads.count);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_piece(f, k, pieces[i], rows_of(pieces[i], f.saved.pooled, s, s.c, bytes));
  });
  squeeze(f, k, middle, threads, f.saved.pooled, f.saved.squeezed, nullptr);
  if (f.norm != Norm::batch) return;
  NormArgs n{};
  n.z = f.saved.squeezed;
  n.mean = f.saved.mean;
  n.var = f.saved.var;
  n.moments = moments;
  n.rows = s.rows();
  n.m = s.m;
  mix_of(k, f.dtype).stats(n);
}

// saved.squeezed and the statistics -> saved.gates and out.
void train_gate(const Forward& f, const Kernels& k, Middle& middle, const Threads& threads) {
  const Shape& s = f.shape;
  int64_t bytes = acc_bytes_of(f.dtype);
  if (f.norm == Norm::batch) {
    middle.mean = f.saved.mean;
    fold_scale(f, k, f.saved.var, middle.scale);
  }
  Scratch scratch(Scratch::round(s.rows() * s.m * bytes) + act_scratch_bytes(s.m));
  ActArgs a{};
  a.z = f.saved.squeezed;
  a.y = scratch.bytes(s.rows() * s.m * bytes);
  a.scale = middle.scale;
  a.shift = middle.shift;
  a.mean = middle.mean;
  a.rows = s.rows();
  a.m = s.m;
  a.activation = f.activation;
  a.scratch = scratch.bytes(0);
  mix_of(k, f.dtype).act(a);
  gate_map(f, k, middle, threads, a.y, f.saved.gates);
}

// Mean and biased variance of all processes' rows (Chan, Golub, LeVeque 1983), in the order of the ranks: the same bits in
// each. Returns their number.
template <class A> int64_t join(const double* moments, int64_t processes, int64_t m, A* mean, A* var) {
  const int64_t width = 1 + 2 * m;
  double rows = 0;
  for (int64_t p = 0; p < processes; ++p) rows += moments[p * width];
  for (int64_t i = 0; i < m; ++i) {
    double sum = 0, square = 0;
    for (int64_t p = 0; p < processes; ++p) sum += moments[p * width] * moments[p * width + 1 + i];
    const double centre = rows > 0 ? sum / rows : 0;
    for (int64_t p = 0; p < processes; ++p) {
      const double* of = moments + p * width;
      square += of[1 + m + i] + of[0] * (of[1 + i] - centre) * (of[1 + i] - centre);
    }
    mean[i] = (A)centre;
    var[i] = (A)(rows > 0 ? square / rows : 1);
  }
  return (int64_t)rows;
}

// Batch statistics of x before the block: mean and biased variance by channel, joined over the images in their order.
template <class A>
void join_images(double* moments, const Shape& s, A* mean, A* var) {
  const double pixels = (double)(s.h * s.w);
  double *mean_of = moments, *square_of = moments + s.c;  // of the images so far, in the first one's place
  for (int64_t i = 1; i < s.n; ++i) {
    const double *next = moments + i * 2 * s.c, share = 1 / (double)(i + 1), weight = pixels * ((double)i * share);
    for (int64_t c = 0; c < s.c; ++c) {
      const double delta = next[c] - mean_of[c], moved = mean_of[c] + delta * share;
      square_of[c] += next[s.c + c] + delta * delta * weight;
      mean_of[c] = moved - moved == 0 ? moved : mean_of[c] * (1 - share) + next[c] * share;  // an infinite mean stays one
    }
  }
  for (int64_t c = 0; c < s.c; ++c) {
    mean[c] = (A)mean_of[c];
    var[c] = (A)(square_of[c] / (pixels * (double)s.n));
  }
}

void statistics_before(const ForwardArgs& f, const Kernels& k, const Threads& threads, void* mean, void* var) {
  const Shape& s = f.shape;
  Scratch scratch(s.n * 2 * s.c * 8);
  double* moments = (double*)scratch.bytes(0);
  Pieces pieces(f, threads.count);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch none(1);  // moments take nothing of it; of no bytes it may be null
    for (int64_t i = begin; i < end; ++i) {
      PlaneArgs a = plane_args(f, pieces[i], none);
      a.x = start_of(pieces[i], f, f.x);
      a.x_step = f.x.step;
      a.sum = moments + pieces[i].image * 2 * s.c;
      a.square = a.sum + s.c;
      k.map[(int)f.dtype].moments[f.nhwc](a);
    }
  });
  if (f.dtype == DType::f64) join_images(moments, s, (double*)mean, (double*)var);
  else join_images(moments, s, (float*)mean, (float*)var);
}

}  // namespace

void forward(const ForwardArgs& args, const Threads& all_threads) {
  const Kernels& k = kernels();
  Forward f(args);
  const Shape& s = f.shape;
  const DType acc = acc_of(f.dtype);
  const bool ahead = f.before.norm != Norm::none;
  const int64_t m_bytes = Scratch::round(s.m * bytes_of(acc)), c_bytes = ahead ? Scratch::round(padded(s.c) * bytes_of(acc)) : 0;
  Scratch scratch(2 * m_bytes + 2 * c_bytes + Middle::scratch_bytes(f) + Ahead::scratch_bytes(f));
  auto given = [&](const Param& from, int64_t count, void* kept) {
    void* to = kept ? kept : scratch.bytes(count * bytes_of(acc));
    load_param(k, acc, from, count, to);
    return to;
  };
  const bool fixed = f.norm == Norm::given, fixed_before = f.before.norm == Norm::given;
  const void* mean = fixed ? given(f.params.mean, s.m, f.saved.mean) : nullptr;
  const void* var = fixed ? given(f.params.var, s.m, f.saved.var) : nullptr;
  void* before_mean = fixed_before ? given(f.before.mean, s.c, f.saved.before_mean) : f.saved.before_mean;
  void* before_var = fixed_before ? given(f.before.var, s.c, f.saved.before_var) : f.saved.before_var;
  if (s.n * s.c * s.h * s.w == 0) return;
  Threads threads = worth(all_threads, work_ns(f));
  if (f.before.norm == Norm::batch) statistics_before(f, k, threads, before_mean, before_var);
  if (ahead) f.ahead = Ahead(f, k, scratch, before_mean, before_var);
  // One image does not repay a pass over the transposed weights (the call at 960 x 7 x 7: 49.2 us with, 45.8 us without).
  Middle middle(f, k, scratch, mean, var, s.n > 1);
  if (f.saved.pooled) {
    train_squeeze(f, k, middle, threads, nullptr);
    return train_gate(f, k, middle, threads);
  }
  int64_t t = threads.count, whole = s.n / t * t;
  run(threads, whole, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) infer(f, k, middle, one_thread, i, 1);
  });
  if (whole < s.n) infer(f, k, middle, threads, whole, s.n - whole);
}

void forward_local(const ForwardArgs& args, double* moments, const Threads& all_threads) {
  const Forward f(args);
  const Shape& s = f.shape;
  if (s.n * s.c * s.h * s.w == 0) {
    for (int64_t i = 0; i < 1 + 2 * s.m; ++i) moments[i] = 0;
    return;
  }
  const Kernels& k = kernels();
  Scratch scratch(Middle::scratch_bytes(f));
  Middle middle(f, k, scratch, nullptr, nullptr, false);
  moments[0] = (double)s.rows();
  train_squeeze(f, k, middle, worth(all_threads, work_ns(f)), moments + 1);
}

int64_t forward_joined(const ForwardArgs& args, const double* moments, int64_t processes, const Threads& all_threads) {
  const Forward f(args);
  const Shape& s = f.shape;
  int64_t rows = f.dtype == DType::f64 ? join(moments, processes, s.m, (double*)f.saved.mean, (double*)f.saved.var)
                                       : join(moments, processes, s.m, (float*)f.saved.mean, (float*)f.saved.var);
  if (s.n * s.c * s.h * s.w == 0) return rows;
  const Kernels& k = kernels();
  Scratch scratch(Middle::scratch_bytes(f));
  Middle middle(f, k, scratch, nullptr, nullptr, s.n > 1);
  train_gate(f, k, middle, worth(all_threads, work_ns(f)));
  return rows;
}

void pool(const PoolArgs& p, const Threads& all_threads) {
  const Kernels& k = kernels();
  Threads threads = worth(all_threads, work_ns(p));
  Pieces pieces(p, threads.count);
  int64_t bytes = acc_bytes_of(p.dtype), c = p.shape.c, length = p.shape.length();
  Forward f{ForwardArgs(p)};
  f.x = p.x;
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      void* image = at(p.pooled, pieces[i].image * length * c, bytes);
      pool_piece(f, k, pieces[i], {image, at(image, p.shape.h * c, bytes), c});
    }
  });
}

void gate(const GateArgs& g, const Threads& all_threads) {
  const Kernels& k = kernels();
  Threads threads = worth(all_threads, work_ns(g));
  Pieces pieces(g, threads.count, g.nhwc ? Pieces::rows : Pieces::channels);
  int64_t bytes = acc_bytes_of(g.dtype);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(k.map[(int)g.dtype].plane_scratch(g.shape.h, g.shape.w, g.shape.c));
    for (int64_t i = begin; i < end; ++i) {
      Piece p = pieces[i];
      PlaneArgs a = plane_args(g, p, scratch);
      a.x = start_of(p, g, g.x);
      a.x_step = g.x.step;
      a.out = start_of(p, g, g.out);
      a.out_step = g.out.step;
      a.gates = rows_of(p, g.gates, g.shape, g.shape.c, bytes);
      k.map[(int)g.dtype].gate[as_is][g.nhwc](a);
    }
  });
}

}  // namespace coordatt
