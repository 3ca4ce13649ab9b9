// One case: sizes, types, strides and threads of a call, and all that is compared of it.
#pragma once

#include "parts.h"

namespace native {

enum class Spread { dense, gaps, far, broadcast };  // how the elements of maps lie: far: each map beyond an L2

struct Case {
  Shape shape{};
  DType dtype = DType::f32, params = DType::f32;
  bool nhwc = false;
  Norm norm = Norm::batch;
  Activation activation = Activation::hard_swish;
  bool skip = false, bias = true, affine = true;
  Spread spread = Spread::dense;
  int threads = 1;
  Norm before = Norm::none;  // what stands before the block
  int before_activation = coordatt::no_activation;
  bool before_affine = true;
  double special = 0;  // what one element of x and one of its gradient are, where it is not finite
};

std::string describe(const Case&);
void run_case(Report&, const Levels&, const Case&, uint64_t seed);

}  // namespace native
