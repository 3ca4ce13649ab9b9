// Which calls are made: sizes around every vector width in use (2 to 16 lanes, up to 8 vectors a row), and all that a call
// can say beside them.
#include "call.h"

namespace native {
namespace {

using coordatt::no_activation;

constexpr Activation activations[] = {Activation::hard_swish, Activation::silu, Activation::relu, Activation::relu6};
constexpr Norm norms[] = {Norm::batch, Norm::given, Norm::none};

// N, C, H, W, M
constexpr Shape awkward[] = {
    {1, 1, 1, 1, 1}, {2, 1, 5, 9, 8}, {3, 16, 1, 11, 8}, {3, 16, 11, 1, 8}, {1, 2, 2, 2, 8}, {3, 17, 13, 7, 9},
    {2, 5, 3, 31, 13}, {2, 3, 4, 4, 64}, {2, 12, 6, 5, 1}, {37, 3, 8, 2, 5},
};
// Past 128 rows of the middle, 24 and 32 rows of a plane, 8 vectors of a row, 64 pixels, 256 KB.
constexpr Shape large[] = {
    {1, 3, 129, 3, 8}, {1, 2, 3, 130, 8}, {2, 5, 25, 33, 4}, {1, 65, 33, 31, 8}, {1, 129, 3, 5, 30}, {3, 2, 65, 66, 3},
};
constexpr int64_t widths[] = {1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 19, 23, 24, 25, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129};
constexpr int64_t channels[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 63, 64, 65, 67};
constexpr int64_t heights[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 23, 24, 25, 32, 33, 48};

class Cases {
 public:
  Cases(Report& report, const Levels& levels, uint64_t seed, Share& share)
      : report_(report), levels_(levels), seed_(seed), share_(share) {}

  void run(const Case& c) {
    ++count_;
    if (share_.mine()) run_case(report_, levels_, c, seed_ * 1000003 + count_);
  }

  // What a call says beside its sizes, another combination each time.
  Case next(const Shape& shape, DType dtype, bool nhwc) {
    const int64_t i = turn_++;
    Case c;
    c.shape = shape;
    c.dtype = dtype;
    c.nhwc = nhwc;
    c.params = dtype == DType::f64 || i % 2 ? dtype : DType::f32;
    c.norm = norms[i % 3];
    c.activation = activations[i / 3 % 4];
    c.skip = i / 5 % 2;
    c.bias = i % 7 != 3;
    // The only row or column, of images that are all the same, lies at the mean of the others: on relu's jump.
    c.affine = i % 11 != 5 || shape.h == 1 || shape.w == 1;
    c.spread = i % 5 == 2 ? Spread::broadcast : i % 2 ? Spread::gaps : Spread::dense;
    c.threads = 1 + (int)(i / 2 % 3);
    return c;
  }

  // The same with something before the block.
  Case ahead(Case c) {
    const int64_t i = turn_before_++;
    // The gradient that batch statistics of a few values a channel leave is rounding.
    c.before = i % 2 && c.shape.n * c.shape.h * c.shape.w > 4 ? Norm::batch : Norm::given;
    c.before_activation = no_activation + (int)(i / 2 % 5);
    c.before_affine = i % 7 != 2;
    return c;
  }

  template <class F> void everywhere(const F& f) {
    for (DType t : dtypes)
      for (bool nhwc : {false, true}) f(t, nhwc);
  }

  void combinations() {
    everywhere([&](DType t, bool nhwc) {
      for (Norm norm : norms)
        for (Activation activation : activations)
          for (bool skip : {false, true}) {
            Case c = next({2, 5, 3, 6, 3}, t, nhwc);
            c.norm = norm, c.activation = activation, c.skip = skip;
            run(c);
          }
      for (Norm norm : {Norm::given, Norm::batch})
        for (int activation = no_activation; activation < coordatt::activations; ++activation) {
          Case c = ahead(next({2, 5, 3, 6, 3}, t, nhwc));
          c.before = norm, c.before_activation = activation;
          run(c);
        }
    });
  }

  // Alone, and with something before the block for half of the types.
  void run_size(const Shape& s, DType t, bool nhwc) {
    run(next(s, t, nhwc));
    if ((asked_++ + (int)t) % 2) run(ahead(next(s, t, nhwc)));
  }

  void sizes() {
    everywhere([&](DType t, bool nhwc) {
      for (const Shape& s : awkward) run_size(s, t, nhwc);
      for (int64_t w : widths) run_size({1, 2, 3, w, 2}, t, nhwc);
      for (int64_t c : channels) run_size({1, c, 2, 3, 2 + c % 4}, t, nhwc);
      for (int64_t h : heights) run_size({2, 3, h, 2, 3}, t, nhwc);
      for (int64_t side : {6, 7, 8, 10, 14, 15, 16}) run_size({1, 17, side, side, 2}, t, nhwc);
    });
  }

  void large_sizes() {
    everywhere([&](DType t, bool nhwc) {
      for (const Shape& s : large) run_size(s, t, nhwc);
      Case far = next({1, 67, 3, 3, 3}, t, true);
      far.spread = Spread::far;
      if (nhwc) run(far);
    });
  }

  void not_finite() {
    everywhere([&](DType t, bool nhwc) {
      for (double special : {(double)NAN, (double)INFINITY, -(double)INFINITY})
        for (Activation activation : activations) {
          Case c = next({2, 3, 4, 7, 2}, t, nhwc);
          c.special = special, c.activation = activation, c.norm = norms[turn_ % 3];
          run(turn_ % 2 ? ahead(c) : c);
        }
    });
  }

 private:
  Report& report_;
  const Levels& levels_;
  uint64_t seed_, count_ = 0;
  int64_t turn_ = 0, turn_before_ = 0, asked_ = 0;
  Share& share_;
};

}  // namespace

void check_calls(Report& report, const Levels& levels, uint64_t seed, Share& share) {
  Cases cases(report, levels, seed, share);
  cases.combinations();
  cases.sizes();
  cases.large_sizes();
  cases.not_finite();
}

}  // namespace native
