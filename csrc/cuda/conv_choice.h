// Which algorithm computes a pass of a convolution on the GPU: the table of choices, and what it
// needs of the tensors' layouts. A function of the problem and the device; for fprop and dgrad of
// one sample's problem, so that its bits do not depend on the batch, but for tensors of 2^31
// pixels.
#pragma once

#include "cuda/conv_passes.h"

namespace torchconv::cuda {

enum class ConvAlgorithm : uint8_t {
  kSimt,
  kWinograd,
  kDepthwise,
  kGrouped,
  kGroupedMma,
  kMma,
  kCutlass
};

struct ConvPlan {
  ConvAlgorithm algorithm;
  // What the algorithm is given: the problem itself, or the same in NHWC, with weights as
  // K x R x S x C and turned already, of which conv2d.cpp makes copies.
  ConvProblem problem;
};

// Of fprop, beside y = g(z).
struct Extras {
  bool preactivation = false;  // z is wanted too
  bool residual = false;       // z has another image added
};

ConvPlan plan_conv(const ConvProblem& p, Pass pass, const Extras& extras, const Queue& queue);

}  // namespace torchconv::cuda
