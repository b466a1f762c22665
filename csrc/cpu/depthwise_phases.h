// dgrad of a depthwise convolution with a stride, pixels contiguous (NCHW), for any kernel,
// dilation and number of filters: each phase of the stride is a sum of few taps, all over one
// copied band of dz, and rows of dx are written whole.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// A group for each channel of x, and steps between columns for which vectors are interleaved.
bool depthwise_phases_applies(const ConvProblem& p);

// The problem applies. Writes all of dx.
template <typename T>
void depthwise_phases(const ConvProblem& p, const T* dz, const T* w, T* dx, const Parallel& pool);

}  // namespace torchconv::cpu
