// The kernels behind the depthwise_* functions of conv_passes.h; depthwise.cpp chooses.
#pragma once

#include <algorithm>

#include "cuda/gather.h"

namespace torchconv::cuda {

// fprop and dgrad by small square kernels, pixels contiguous; any number of channels in a group.
void depthwise_planes(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue);

}  // namespace torchconv::cuda
