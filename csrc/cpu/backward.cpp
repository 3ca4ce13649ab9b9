// Backward of a whole call: gate (reduce), mix, pool (spread).
#include <math.h>

#include "middle.h"
#include "tuning.h"

namespace coordatt {
namespace {

PlaneArgs plane_of(const Call& call, const Piece& p, const Map& grad, Scratch& scratch) {
  PlaneArgs a = plane_args(call, p, scratch);
  a.grad = start_of(p, call, grad);
  a.grad_step = grad.step;
  return a;
}

// ds [R, C] from grad, x and the gates.
void reduce(const Call& call, const Kernels& k, const Ahead& ahead, const Threads& threads, const Map& grad, const Map& x,
            void* gates, void* ds) {
  const Shape& s = call.shape;
  Pieces pieces(call, threads.count);
  int64_t bytes = acc_bytes_of(call.dtype);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(k.map[(int)call.dtype].plane_scratch(s.h, s.w, s.c));
    for (int64_t i = begin; i < end; ++i) {
      Piece p = pieces[i];
      PlaneArgs a = plane_of(call, p, grad, scratch);
      a.x = start_of(p, call, x);
      a.x_step = x.step;
      a.gates = rows_of(p, gates, s, s.c, bytes);
      a.dlogits = rows_of(p, ds, s, s.c, bytes);
      a.before = ahead.args;
      k.map[(int)call.dtype].gate_reduce[ahead.read][call.nhwc](a);
    }
  });
}

// Rows of the middle by the task: h rows first, then w rows.
struct RowTask {
  int64_t first, count;
  bool is_h;
};
struct RowTasks {
  int64_t h_rows, w_rows, h_tasks, w_tasks;
  explicit RowTasks(const Shape& s)
      : h_rows(s.n * s.h), w_rows(s.n * s.w),
        h_tasks((h_rows + backward_rows - 1) / backward_rows), w_tasks((w_rows + backward_rows - 1) / backward_rows) {}
  int64_t count() const { return h_tasks + w_tasks; }
  RowTask operator[](int64_t i) const {
    bool is_h = i < h_tasks;
    int64_t offset = is_h ? i * backward_rows : (i - h_tasks) * backward_rows, rows = is_h ? h_rows : w_rows;
    return {offset + (is_h ? 0 : h_rows), offset + backward_rows < rows ? backward_rows : rows - offset, is_h};
  }
};

// The middle's part, all in the accumulate type.
struct MixBackward {
  const BackwardArgs& b;
  const Kernels& k;
  const MixKernels& mix;
  const Middle& middle;
  int64_t bytes, c, m, rows;
  void *ds, *dz, *y;  // [R, C], [R, M], [R, M]

  MixBackward(const BackwardArgs& args, const Kernels& kernels, const Middle& mid, const MixGradients& to)
      : b(args), k(kernels), mix(mix_of(kernels, args.dtype)), middle(mid), bytes(acc_bytes_of(args.dtype)),
        c(args.shape.c), m(args.shape.m), rows(args.shape.rows()), ds(to.dlogits), dz(to.du), y(to.y) {}

  // ds -> du (in dz's place) and y; sums: [2, M], of du and of du * (z - mean).
  void activation(const Threads& threads, double* sums) {
    RowTasks tasks(b.shape);
    Scratch of_tasks(tasks.count() * 2 * m * 8);
    double* parts = (double*)of_tasks.bytes(0);
    run(threads, tasks.count(), [&](int64_t begin, int64_t end) {
      Scratch scratch(act_scratch_bytes(m));
      for (int64_t i = begin; i < end; ++i) {
        RowTask r = tasks[i];
        DotArgs d{};
        d.a = at(ds, r.first * c, bytes); d.lda = c;
        d.b = r.is_h ? middle.expand_h : middle.expand_w; d.ldb = c;
        d.out = at(dz, r.first * m, bytes); d.ldo = m;
        d.rows = r.count; d.cols = m; d.depth = c;
        mix.dot(d);
        ActArgs a{};
        a.z = at(b.saved.squeezed, r.first * m, bytes);
        a.scale = middle.scale; a.shift = middle.shift; a.mean = middle.mean;
        a.y = at(y, r.first * m, bytes);
        a.dy = d.out;
        a.sum_du = parts + i * 2 * m;
        a.sum_du_dev = a.sum_du + m;
        for (int64_t j = 0; j < 2 * m; ++j) a.sum_du[j] = 0;
        a.rows = r.count; a.m = m;
        a.activation = b.activation;
        a.scratch = scratch.bytes(0);
        mix.act_backward(a);
      }
    });
    for (int64_t i = 0; i < 2 * m; ++i) {
      sums[i] = 0;
      for (int64_t j = 0; j < tasks.count(); ++j) sums[i] += parts[j * 2 * m + i];
    }
  }

  template <class A>
  void put(const Param& to, int64_t i, double value) {
    A v = (A)value;
    if (to) k.map[(int)to.dtype].from_acc(&v, (char*)to.data + i * bytes_of(to.dtype), 1);
  }

  // du -> dz in place, and the gradients of bn's parameters and conv1's bias. all_sums: over the rows that the batch
  // statistics were taken over, all_rows of them.
  template <class A>
  void normalisation(const Threads& threads, const double* sums, const double* all_sums, int64_t all_rows) {
    Scratch scratch(2 * Scratch::round(m * bytes));
    A* offset = (A*)scratch.bytes(m * bytes);
    A* slope = (A*)scratch.bytes(m * bytes);
    const A* scale = (const A*)middle.scale;
    const A* var = (const A*)b.saved.var;
    for (int64_t i = 0; i < m; ++i) {
      double du = sums[i], dev = sums[m + i];
      double inv = b.norm == Norm::none ? 1 : 1 / sqrt((double)var[i] + b.params.eps);
      bool batch = b.norm == Norm::batch;
      offset[i] = (A)(all_sums[i] / (double)all_rows);
      slope[i] = (A)(inv * inv * all_sums[m + i] / (double)all_rows);
      put<A>(b.out.bn_weight, i, dev * inv);
      put<A>(b.out.bn_bias, i, du);
      // Under batch statistics the mean takes any shift out again: exactly zero.
      put<A>(b.out.conv1_bias, i, batch ? 0.0 : scale[i] * du);
    }
    run(threads, (rows + backward_rows - 1) / backward_rows, [&](int64_t begin, int64_t end) {
      int64_t r0 = begin * backward_rows, r1 = end * backward_rows < rows ? end * backward_rows : rows;
      NormArgs a{};
      a.z = at(b.saved.squeezed, r0 * m, bytes);
      a.mean = (void*)middle.mean;
      a.du = at(dz, r0 * m, bytes);
      a.scale = scale;
      if (b.norm == Norm::batch) { a.offset = offset; a.slope = slope; }
      a.rows = r1 - r0; a.m = m;
      mix.norm_backward(a);
    });
  }

  // The gradients of the three convolutions' weights and of the expanding ones' biases.
  void weights(const Threads& threads) {
    int64_t h_rows = b.shape.n * b.shape.h;
    struct Product {
      const Param& to;
      const Param& bias;
      const void *left, *right;  // [rows, M], [rows, C]
      int64_t rows;
      bool transposed;           // to is [C, M]
    };
    const Product products[3] = {
        {b.out.conv_h_weight, b.out.conv_h_bias, y, ds, h_rows, true},
        {b.out.conv_w_weight, b.out.conv_w_bias, at(y, h_rows * m, bytes), at(ds, h_rows * c, bytes), rows - h_rows, true},
        {b.out.conv1_weight, Param{}, dz, b.saved.pooled, rows, false},
    };
    constexpr int64_t channels = panel_channels;
    int64_t groups = (c + channels - 1) / channels;
    run(threads, 3 * groups, [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::round(m * channels * bytes) * 2);
      char* sum = (char*)scratch.bytes(m * channels * bytes);
      char* turned = (char*)scratch.bytes(m * channels * bytes);
      const DType acc = acc_of(b.dtype);
      for (int64_t t = begin; t < end; ++t) {
        const Product& p = products[t % 3];
        const bool direct = p.to.dtype == acc;  // no copy through scratch (960 x 7 x 7: 5 of 110 us)
        int64_t c0 = t / 3 * channels, width = c0 + channels < c ? channels : c - c0;
        if (p.bias) {
          mix.sum_rows(at((void*)p.right, c0, bytes), c, p.rows, 0, width, sum);
          k.map[(int)p.bias.dtype].from_acc(sum, (char*)p.bias.data + c0 * bytes_of(p.bias.dtype), width);
        }
        if (!p.to) continue;
        AxpyArgs x{};
        x.a_row = 1; x.a_depth = m;
        x.ldb = c;
        x.out = sum; x.ldo = width;
        if (direct && !p.transposed) {
          x.out = (char*)p.to.data + c0 * bytes;
          x.ldo = c;
        }
        x.rows = m; x.c1 = width;
        for (int64_t r = 0; r < p.rows; r += summed_rows) {
          x.a = at((void*)p.left, r * m, bytes);
          x.b = at((void*)p.right, r * c + c0, bytes);
          x.depth = r + summed_rows < p.rows ? summed_rows : p.rows - r;
          x.accumulate = r > 0;
          mix.axpy(x);
        }
        const MapKernels& store = k.map[(int)p.to.dtype];
        int64_t size = bytes_of(p.to.dtype);
        if (p.transposed) {
          void* to = (char*)p.to.data + c0 * m * size;
          mix.transpose(sum, width, m, width, direct ? to : turned, m);
          if (!direct) store.from_acc(turned, to, width * m);
        } else if (!direct) {
          for (int64_t i = 0; i < m; ++i)
            store.from_acc(sum + i * width * bytes, (char*)p.to.data + (i * c + c0) * size, width);
        }
      }
    });
  }

  // One piece's dp = conv1^T dz, what comes back through the pools.
  void form_dp(const Piece& p, const AxisRows& to) {
    const Shape& s = b.shape;
    AxisRows from = rows_of(p, dz, s, m, bytes);
    AxpyArgs x{};
    x.a_row = m; x.a_depth = 1;
    x.b = middle.conv1_weight; x.ldb = c;
    x.ldo = c;
    x.depth = m; x.c0 = p.c0; x.c1 = p.c1;
    x.a = from.h; x.out = to.h; x.rows = s.h;
    mix.axpy(x);
    x.a = from.w; x.out = to.w; x.rows = s.w;
    mix.axpy(x);
  }

  // The gradients of what stands before the block, and dx through it. dp takes ds' place.
  void before(const Threads& threads, BeforeArgs ahead, Read read) {
    const Shape& s = b.shape;
    const MapKernels& map = k.map[(int)b.dtype];
    const bool batch = b.before.norm == Norm::batch;
    Scratch scratch(s.n * 2 * c * 8 + 2 * Scratch::round(padded(c) * bytes));
    double* sums = (double*)scratch.bytes(s.n * 2 * c * 8);
    auto plane = [&](const Piece& p, Scratch& of) {
      PlaneArgs a = plane_of(b, p, b.grad, of);
      a.x = start_of(p, b, b.x);
      a.x_step = b.x.step;
      a.gates = rows_of(p, b.saved.gates, s, c, bytes);
      a.pooled = rows_of(p, ds, s, c, bytes);
      a.before = ahead;
      return a;
    };
    const bool wanted = batch || b.out.before_weight || b.out.before_bias;
    Pieces pieces(b, threads.count);
    run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
      Scratch of(map.plane_scratch(s.h, s.w, c));
      for (int64_t i = end - 1; i >= begin; --i) {  // backwards: what reduce read last is still in cache
        form_dp(pieces[i], rows_of(pieces[i], ds, s, c, bytes));
        if (!wanted) continue;
        PlaneArgs a = plane(pieces[i], of);
        a.sum = sums + pieces[i].image * 2 * c;
        a.square = a.sum + c;
        map.before_sums[read][b.nhwc](a);
      }
    });
    if (wanted) {
      void *offset = scratch.bytes(padded(c) * bytes), *slope = scratch.bytes(padded(c) * bytes);
      if (b.dtype == DType::f64) fold_sums<double>(sums, ahead, (double*)offset, (double*)slope);
      else fold_sums<float>(sums, ahead, (float*)offset, (float*)slope);
      if (batch) {
        ahead.offset = offset;
        ahead.slope = slope;
      }
    }
    if (!b.out.dx.data) return;
    Pieces parts(b, threads.count, pieces.cut() && whole_pixels_pay(b) ? Pieces::rows : Pieces::channels);
    run(threads, parts.count(), [&](int64_t begin, int64_t end) {
      Scratch of(map.plane_scratch(s.h, s.w, c));
      for (int64_t i = begin; i < end; ++i) {  // forwards again: the sums ended here
        PlaneArgs a = plane(parts[i], of);
        a.out = start_of(parts[i], b, b.out.dx);
        a.out_step = b.out.dx.step;
        map.before_spread[read][b.nhwc](a);
      }
    });
  }

  // sums: [N, 2, C] of du and du * (x - mean). In plain PyTorch's terms: dx = (du - offset - (x - mean) slope) scale.
  template <class A>
  void fold_sums(double* sums, const BeforeArgs& ahead, A* offset, A* slope) {
    const A *scale = (const A*)ahead.scale, *var = (const A*)b.saved.before_var;
    const double count = (double)(b.shape.n * b.shape.h * b.shape.w);
    for (int64_t n = 1; n < b.shape.n; ++n)
      for (int64_t i = 0; i < 2 * c; ++i) sums[i] += sums[n * 2 * c + i];
    for (int64_t i = 0; i < c; ++i) {
      const double du = sums[i], dev = sums[c + i];
      const double inv = 1 / sqrt((double)var[i] + b.before.eps);
      put<A>(b.out.before_weight, i, dev * inv);
      put<A>(b.out.before_bias, i, du);
      offset[i] = (A)((double)scale[i] * du / count);
      slope[i] = (A)((double)scale[i] * inv * inv * dev / count);
    }
    for (int64_t i = c; i < padded(c); ++i) offset[i] = slope[i] = 0;
  }

  // dx = grad * gates + dp, formed where it is used.
  void spread(const Threads& threads) {
    const Shape& s = b.shape;
    int64_t dp_bytes = Scratch::round(s.length() * c * bytes);
    auto form_dx = [&](const Piece& p, const AxisRows& dp) {
      Scratch scratch(k.map[(int)b.dtype].plane_scratch(s.h, s.w, s.c));
      PlaneArgs a = plane_of(b, p, b.grad, scratch);
      a.pooled = dp;
      a.gates = rows_of(p, b.saved.gates, s, c, bytes);
      a.out = start_of(p, b, b.out.dx);
      a.out_step = b.out.dx.step;
      k.map[(int)b.dtype].spread[b.nhwc](a);
    };
    Pieces pieces(b, threads.count);
    if (!pieces.cut() || !whole_pixels_pay(b)) {
      run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
        Scratch scratch(dp_bytes);
        void* h = scratch.bytes(dp_bytes);
        AxisRows dp = {h, at(h, s.h * c, bytes), c};
        for (int64_t i = end - 1; i >= begin; --i) {  // backwards: what reduce read last is still in cache
          form_dp(pieces[i], dp);
          form_dx(pieces[i], dp);
        }
      });
      return;
    }
    Scratch scratch(s.n * dp_bytes);
    void* dp = scratch.bytes(s.n * dp_bytes);
    run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) form_dp(pieces[i], rows_of(pieces[i], dp, s, c, bytes));
    });
    Pieces bands(b, threads.count, Pieces::rows);
    run(threads, bands.count(), [&](int64_t begin, int64_t end) {
      for (int64_t i = end - 1; i >= begin; --i) form_dx(bands[i], rows_of(bands[i], dp, s, c, bytes));
    });
  }
};

void zero(const Param& p, int64_t count) {
  for (int64_t i = 0; p && i < count * bytes_of(p.dtype); ++i) ((char*)p.data)[i] = 0;
}

bool is_empty(const BackwardArgs& b) { return b.shape.n * b.shape.c * b.shape.h * b.shape.w == 0; }

void zero_all(const BackwardArgs& b) {
  const Shape& s = b.shape;
  const Gradients& g = b.out;
  zero(g.conv1_weight, s.m * s.c); zero(g.conv1_bias, s.m);
  zero(g.bn_weight, s.m); zero(g.bn_bias, s.m);
  zero(g.conv_h_weight, s.m * s.c); zero(g.conv_h_bias, s.c);
  zero(g.conv_w_weight, s.m * s.c); zero(g.conv_w_bias, s.c);
  zero(g.before_weight, s.c); zero(g.before_bias, s.c);
}

// Before and after the point where batch statistics need all rows.
struct Halves {
  const BackwardArgs& b;
  const Ahead ahead;
  MixBackward mix;
  Threads threads, few;

  Halves(const BackwardArgs& args, const Kernels& k, const Middle& middle, const MixGradients& to, const Threads& all,
         const Ahead& reading = {})
      : b(args), ahead(reading), mix(args, k, middle, to), threads(worth(all, 2 * work_ns(args))),
        few(worth(all, 0.1 * (double)(args.shape.rows() * args.shape.c * args.shape.m))) {}

  void local(double* sums) {
    reduce(b, mix.k, ahead, threads, b.grad, b.x, b.saved.gates, mix.ds);
    mix.activation(few, sums);
  }

  void joined(const double* sums, const double* all_sums, int64_t all_rows) {
    const Gradients& g = b.out;
    if (b.dtype == DType::f64) mix.normalisation<double>(few, sums, all_sums, all_rows);
    else mix.normalisation<float>(few, sums, all_sums, all_rows);
    if (g.conv1_weight || g.conv_h_weight || g.conv_w_weight || g.conv_h_bias || g.conv_w_bias) mix.weights(few);
    if (b.before.norm != Norm::none) mix.before(threads, ahead.args, ahead.read);
    else if (g.dx.data) mix.spread(threads);
  }
};

}  // namespace

void backward(const BackwardArgs& b, const Threads& all_threads) {
  if (is_empty(b)) return zero_all(b);
  const Kernels& k = kernels();
  const Shape& s = b.shape;
  int64_t bytes = acc_bytes_of(b.dtype), sums_bytes = Scratch::round(2 * s.m * 8);
  int64_t ds_bytes = Scratch::round(s.rows() * s.c * bytes), z_bytes = Scratch::round(s.rows() * s.m * bytes);
  const bool before = b.before.norm != Norm::none;
  Scratch scratch(Middle::scratch_bytes(b) + Ahead::scratch_bytes(b) + ds_bytes + 2 * z_bytes + sums_bytes);
  const Ahead ahead = before ? Ahead(b, k, scratch, b.saved.before_mean, b.saved.before_var) : Ahead();
  Middle middle(b, k, scratch, b.norm == Norm::none ? nullptr : b.saved.mean,
                b.norm == Norm::none ? nullptr : b.saved.var, true);
  MixGradients to;
  to.dlogits = scratch.bytes(ds_bytes);
  to.du = scratch.bytes(z_bytes);
  to.y = scratch.bytes(z_bytes);
  double* sums = (double*)scratch.bytes(sums_bytes);
  Halves halves(b, k, middle, to, all_threads, ahead);
  halves.local(sums);
  halves.joined(sums, sums, s.rows());
}

void backward_local(const BackwardArgs& b, const MixGradients& to, double* sums, const Threads& all_threads) {
  for (int64_t i = 0; i < 2 * b.shape.m; ++i) sums[i] = 0;
  if (is_empty(b)) return;
  const Kernels& k = kernels();
  Scratch scratch(Middle::scratch_bytes(b));
  Middle middle(b, k, scratch, b.saved.mean, b.saved.var, true);
  Halves(b, k, middle, to, all_threads).local(sums);
}

void backward_joined(const BackwardArgs& b, const MixGradients& to, const double* sums, const double* all_sums,
                     int64_t processes, int64_t rows, const Threads& all_threads) {
  if (is_empty(b)) return zero_all(b);
  const Kernels& k = kernels();
  const int64_t width = 2 * b.shape.m;
  Scratch scratch(Middle::scratch_bytes(b) + Scratch::round(width * 8));
  Middle middle(b, k, scratch, b.saved.mean, b.saved.var, false);
  double* total = (double*)scratch.bytes(width * 8);
  for (int64_t i = 0; i < width; ++i) {
    total[i] = 0;
    for (int64_t p = 0; p < processes; ++p) total[i] += all_sums[p * width + i];
  }
  Halves(b, k, middle, to, all_threads).joined(sums, total, rows);
}

void pool_backward(const PoolArgs& p, const Threads& all_threads) {
  const Kernels& k = kernels();
  Threads threads = worth(all_threads, work_ns(p));
  Pieces pieces(p, threads.count, p.nhwc ? Pieces::rows : Pieces::channels);
  int64_t bytes = acc_bytes_of(p.dtype), c = p.shape.c;
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(k.map[(int)p.dtype].plane_scratch(p.shape.h, p.shape.w, p.shape.c));
    for (int64_t i = begin; i < end; ++i) {
      PlaneArgs a = plane_args(p, pieces[i], scratch);
      void* image = at(p.pooled, pieces[i].image * p.shape.length() * c, bytes);
      a.pooled = {at(image, pieces[i].h0 * c, bytes), at(image, p.shape.h * c, bytes), c};
      a.out = start_of(pieces[i], p, p.x);
      a.out_step = p.x.step;
      k.map[(int)p.dtype].spread[p.nhwc](a);
    }
  });
}

void gate_backward(const GateArgs& g, const Threads& all_threads) {
  reduce(g, kernels(), Ahead(), worth(all_threads, work_ns(g)), g.grad, g.x, g.gates, g.dlogits);
  GateArgs dx = g;  // the gate is linear in x: dx is the gate applied to grad
  dx.x = g.grad;
  gate(dx, all_threads);
}

}  // namespace coordatt
