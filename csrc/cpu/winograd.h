// 3x3 convolution of step 1 by Winograd's F(4x4,3x3): a quarter of the multiplications.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the view is one that winograd_gather computes: nine taps in a square, one group.
bool winograd_applies(const ConvView& view);

// The gather of one view (see conv_view.h). A tile mixes its inputs, so an infinity, a NaN or an
// overflow may reach outputs whose window does not hold it, but never without making them infinite
// or NaN. The samples with such an output are returned, in ascending order, and what was written
// for them is not to be trusted: the caller has to compute them in another way.
std::vector<int64_t> winograd_gather(const ConvView& view, const float* src, const float* w,
                                     const float* bias, const Epilogue<float>& epilogue,
                                     const Parallel& pool);

}  // namespace torchconv::cpu
