// What a convolution will run, in words and numbers, from the very functions that choose and cut.
#pragma once

#include <string>

#include "core/conv_problem.h"

namespace torchconv::cpu {

// A line for each of fprop, dgrad and wgrad, of fields apart by tabs: the pass; the algorithm; the
// algorithm that computes again what is not finite, or nothing; how the work is cut; arithmetic
// operations of the direct algorithm and of this one (a multiply-add is two); bytes of the tensors.
// The type is a floating-point one and no size is zero.
std::string conv2d_explain(const ConvProblem& p);

}  // namespace torchconv::cpu
