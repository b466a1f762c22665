// fprop of integer tensors: sums modulo 2^bits of the element type, as F.conv2d gives.
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// bias may be null. Any integer DType but kUInt16, in which PyTorch does not convolve.
void conv_integer(const ConvView& view, DType dtype, const void* src, const void* w,
                  const void* bias, void* dst, const Parallel& pool);

}  // namespace torchconv::cpu
