// Backward of a whole call: gate (reduce), mix, pool (spread).
#include <math.h>

#include "work.h"

namespace coordatt {
namespace {

constexpr int64_t block = 128;  // rows of the middle a task takes; fixed, so that sums do not depend on threads

PlaneArgs plane_of(const Call& call, const Piece& p, const Map& grad, Scratch& scratch) {
  PlaneArgs a = plane_args(call, p, scratch);
  a.grad = start_of(p, call, grad);
  a.grad_step = grad.step;
  return a;
}

// ds [R, C] from grad, x and the gates.
void reduce(const Call& call, const Kernels& k, const Threads& threads, const Map& grad, const Map& x, void* gates, void* ds) {
  const Shape& s = call.shape;
  Pieces pieces(call, threads.count);
  int64_t bytes = acc_bytes(call.dtype);
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(plane_scratch_bytes(s.h, s.w, s.c));
    for (int64_t i = begin; i < end; ++i) {
      Piece p = pieces[i];
      PlaneArgs a = plane_of(call, p, grad, scratch);
      a.x = start_of(p, call, x);
      a.x_step = x.step;
      a.gates = rows_of(p, gates, s, s.c, bytes);
      a.dlogits = rows_of(p, ds, s, s.c, bytes);
      k.map[(int)call.dtype].gate_reduce[call.nhwc](a);
    }
  });
}

// Rows of the middle in blocks: h rows first, then w rows.
struct RowBlock {
  int64_t first, count;
  bool is_h;
};
struct RowBlocks {
  int64_t h_rows, w_rows, h_blocks, w_blocks;
  explicit RowBlocks(const Shape& s)
      : h_rows(s.n * s.h), w_rows(s.n * s.w), h_blocks((h_rows + block - 1) / block), w_blocks((w_rows + block - 1) / block) {}
  int64_t count() const { return h_blocks + w_blocks; }
  RowBlock operator[](int64_t i) const {
    bool is_h = i < h_blocks;
    int64_t offset = is_h ? i * block : (i - h_blocks) * block, rows = is_h ? h_rows : w_rows;
    return {offset + (is_h ? 0 : h_rows), offset + block < rows ? block : rows - offset, is_h};
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

  MixBackward(const BackwardArgs& args, const Kernels& kernels, const Middle& mid, void* ds_, void* dz_, void* y_)
      : b(args), k(kernels), mix(mix_of(kernels, args.dtype)), middle(mid), bytes(acc_bytes(args.dtype)),
        c(args.shape.c), m(args.shape.m), rows(args.shape.rows()), ds(ds_), dz(dz_), y(y_) {}

  // ds -> du (in dz's place) and y; sums: per block [2, M], sum of du and of du * (z - mean).
  void activation(const Threads& threads, double* sums) {
    RowBlocks blocks(b.shape);
    run(threads, blocks.count(), [&](int64_t begin, int64_t end) {
      Scratch scratch(act_scratch_bytes(m));
      for (int64_t i = begin; i < end; ++i) {
        RowBlock r = blocks[i];
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
        a.sum_du = sums + i * 2 * m;
        a.sum_du_dev = a.sum_du + m;
        for (int64_t j = 0; j < 2 * m; ++j) a.sum_du[j] = 0;
        a.rows = r.count; a.m = m;
        a.activation = b.activation;
        a.scratch = scratch.bytes(0);
        mix.act_backward(a);
      }
    });
  }

  template <class A>
  void put(const Param& to, int64_t i, double value) {
    A v = (A)value;
    if (to) k.map[(int)to.dtype].from_acc(&v, (char*)to.data + i * dtype_bytes(to.dtype), 1);
  }

  // du -> dz in place, and the gradients of bn's parameters and conv1's bias.
  template <class A>
  void normalisation(const Threads& threads, const double* sums, A* offset, A* slope) {
    int64_t blocks = RowBlocks(b.shape).count();
    const A* scale = (const A*)middle.scale;
    const A* var = (const A*)b.saved.var;
    for (int64_t i = 0; i < m; ++i) {
      double du = 0, dev = 0;
      for (int64_t j = 0; j < blocks; ++j) {
        du += sums[j * 2 * m + i];
        dev += sums[j * 2 * m + m + i];
      }
      double inv = b.norm == Norm::none ? 1 : 1 / sqrt((double)var[i] + b.params.eps);
      bool batch = b.norm == Norm::batch;
      offset[i] = (A)(scale[i] * du / (double)rows);
      slope[i] = (A)(scale[i] * inv * inv * dev / (double)rows);
      put<A>(b.out.bn_weight, i, dev * inv);
      put<A>(b.out.bn_bias, i, du);
      // Under batch statistics the mean takes any shift out again: exactly zero.
      put<A>(b.out.conv1_bias, i, batch ? 0.0 : scale[i] * du);
    }
    run(threads, (rows + block - 1) / block, [&](int64_t begin, int64_t end) {
      int64_t r0 = begin * block, r1 = end * block < rows ? end * block : rows;
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
    constexpr int64_t channels = 32;
    int64_t groups = (c + channels - 1) / channels;
    run(threads, 3 * groups, [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::round(m * channels * bytes) * 2);
      char* sum = (char*)scratch.bytes(m * channels * bytes);
      char* turned = (char*)scratch.bytes(m * channels * bytes);
      const DType acc = b.dtype == DType::f64 ? DType::f64 : DType::f32;
      for (int64_t t = begin; t < end; ++t) {
        const Product& p = products[t % 3];
        const bool direct = p.to.dtype == acc;  // no copy through scratch (960 x 7 x 7: 5 of 110 us)
        int64_t c0 = t / 3 * channels, width = c0 + channels < c ? channels : c - c0;
        if (p.bias) {
          mix.sum_rows(at((void*)p.right, c0, bytes), c, p.rows, 0, width, sum);
          k.map[(int)p.bias.dtype].from_acc(sum, (char*)p.bias.data + c0 * dtype_bytes(p.bias.dtype), width);
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
        for (int64_t r = 0; r < p.rows; r += 2 * block) {
          x.a = at((void*)p.left, r * m, bytes);
          x.b = at((void*)p.right, r * c + c0, bytes);
          x.depth = r + 2 * block < p.rows ? 2 * block : p.rows - r;
          x.accumulate = r > 0;
          mix.axpy(x);
        }
        const MapKernels& store = k.map[(int)p.to.dtype];
        int64_t size = dtype_bytes(p.to.dtype);
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

  // dx = grad * gates + what comes back through the pools (dp = conv1^T dz, formed where it is used).
  void spread(const Threads& threads) {
    const Shape& s = b.shape;
    int64_t dp_bytes = Scratch::round(s.length() * c * bytes);
    auto form_dp = [&](const Piece& p, const AxisRows& to) {
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
    };
    auto form_dx = [&](const Piece& p, const AxisRows& dp) {
      Scratch scratch(plane_scratch_bytes(s.h, s.w, s.c));
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
  for (int64_t i = 0; p && i < count * dtype_bytes(p.dtype); ++i) ((char*)p.data)[i] = 0;
}

}  // namespace

void backward(const BackwardArgs& b, const Threads& all_threads) {
  const Kernels& k = kernels();
  const Shape& s = b.shape;
  const Gradients& g = b.out;
  if (s.rows() == 0 || s.n * s.c * s.h * s.w == 0) {
    zero(g.conv1_weight, s.m * s.c); zero(g.conv1_bias, s.m);
    zero(g.bn_weight, s.m); zero(g.bn_bias, s.m);
    zero(g.conv_h_weight, s.m * s.c); zero(g.conv_h_bias, s.c);
    zero(g.conv_w_weight, s.m * s.c); zero(g.conv_w_bias, s.c);
    return;
  }
  Threads threads = worth(all_threads, 2 * work_ns(b));
  int64_t bytes = acc_bytes(b.dtype), blocks = RowBlocks(s).count();
  int64_t ds_bytes = Scratch::round(s.rows() * s.c * bytes), z_bytes = Scratch::round(s.rows() * s.m * bytes);
  int64_t m_bytes = Scratch::round(s.m * bytes), sums_bytes = Scratch::round(blocks * 2 * s.m * 8);
  Scratch scratch(Middle::scratch_bytes(b) + ds_bytes + 2 * z_bytes + sums_bytes + 2 * m_bytes);
  Middle middle(b, k, scratch, b.norm == Norm::none ? nullptr : b.saved.mean,
                b.norm == Norm::none ? nullptr : b.saved.var, true);
  void* ds = scratch.bytes(ds_bytes);
  void* dz = scratch.bytes(z_bytes);
  void* y = scratch.bytes(z_bytes);
  double* sums = (double*)scratch.bytes(sums_bytes);
  void* offset = scratch.bytes(m_bytes);
  void* slope = scratch.bytes(m_bytes);

  reduce(b, k, threads, b.grad, b.x, b.saved.gates, ds);
  MixBackward mix(b, k, middle, ds, dz, y);
  Threads few = worth(all_threads, 0.1 * (double)(s.rows() * s.c * s.m));
  mix.activation(few, sums);
  if (b.dtype == DType::f64) mix.normalisation<double>(few, sums, (double*)offset, (double*)slope);
  else mix.normalisation<float>(few, sums, (float*)offset, (float*)slope);
  if (g.conv1_weight || g.conv_h_weight || g.conv_w_weight || g.conv_h_bias || g.conv_w_bias) mix.weights(few);
  if (g.dx.data) mix.spread(threads);
}

void pool_backward(const PoolArgs& p, const Threads& all_threads) {
  const Kernels& k = kernels();
  Threads threads = worth(all_threads, work_ns(p));
  Pieces pieces(p, threads.count, p.nhwc ? Pieces::rows : Pieces::channels);
  int64_t bytes = acc_bytes(p.dtype), c = p.shape.c;
  run(threads, pieces.count(), [&](int64_t begin, int64_t end) {
    Scratch scratch(plane_scratch_bytes(p.shape.h, p.shape.w, p.shape.c));
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
  reduce(g, kernels(), worth(all_threads, work_ns(g)), g.grad, g.x, g.gates, g.dlogits);
  GateArgs dx = g;  // the gate is linear in x: dx is the gate applied to grad
  dx.x = g.grad;
  gate(dx, all_threads);
}

}  // namespace coordatt
