// One batch normalisation of images, described once by csrc/ops and read by every kernel.
#pragma once

#include "core/types.h"

namespace torchconv {

struct BatchNormProblem {
  int64_t N, C, H, W;     // none of them 0
  DType dtype;            // of x, y, residual and gradients: float32, float64, bfloat16 or float16
  DType parameters;       // of weight, bias, their gradients and running statistics
  Layout layout;          // of x, y, residual and gradients
  Activation activation;  // kNone, kReLU or kReLU6
};

}  // namespace torchconv
