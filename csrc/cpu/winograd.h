// 3x3 convolution of step 1, with any dilation, by Winograd's F(4x4,3x3): a quarter of the
// multiplications.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the view is one that winograd_gather computes: nine taps in a square, one group.
bool winograd_applies(const ConvView& view);

// Multiplications for a sample, a channel and a filter.
int64_t winograd_products(const ConvView& view);

// Elements of the transformed weights of a view that are worth keeping from call to call; 0 where
// transforming anew costs less than reading them. They depend on the weights, C, K, the strides of
// the weights and the order of the taps alone: views of any batch and image size share them.
int64_t winograd_weights_size(const ConvView& view);
// Fills them.
void winograd_pack_weights(const ConvView& view, const float* w, float* u, const Parallel& pool);

// The gather of one view (see conv_view.h). u: from winograd_pack_weights, or null. A tile mixes
// its inputs, so an infinity, a NaN or an overflow may reach outputs whose window does not hold it,
// but never without making them infinite or NaN. The samples with such an output are returned, in
// ascending order, and what was written for them is not to be trusted: the caller has to compute
// them in another way.
std::vector<int64_t> winograd_gather(const ConvView& view, const float* src, const float* w,
                                     const float* bias, const Epilogue<float>& epilogue,
                                     const Parallel& pool, const float* u = nullptr);

}  // namespace torchconv::cpu
