// The kernel of channel_lines.cuh: fprop and dgrad by small square kernels, channels contiguous.
#pragma once

#include "cuda/depthwise.h"

namespace torchconv::cuda {

// Half types, 3x3, 5x5 and 7x7 fprop and dgrad of stride 1, on tensor cores, sm_80 and later.
// False, and nothing done, where channels or pointers are no multiples of 16 bytes, a channel has
// several filters, or the activation is more than a comparison.
bool depthwise_channel_mma(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                           const void* in, const void* w, const void* bias, void* out,
                           Activation activation, const Queue& queue);

}  // namespace torchconv::cuda
