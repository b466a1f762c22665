// The weight gradient of 3x3 kernels by Winograd's F(3x3, 4x4): a quarter of the multiplications.
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether view (fprop's) has all nine taps of a 3x3 kernel, step 1, no dilation and no groups.
// Images may be as small as one tile.
bool winograd_wgrad_applies(const ConvView& view);

// Writes dw. False where an element is not finite: the transforms spread infinity, NaN and overflow
// over all taps, so that the caller has to compute dw another way.
bool winograd_wgrad(const ConvView& view, const float* dz, const float* x, float* dw,
                    const Parallel& pool);

}  // namespace torchconv::cpu
