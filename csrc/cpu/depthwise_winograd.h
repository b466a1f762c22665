// Depthwise convolution in float with channels contiguous (NHWC) by square kernels of 3, 5 and 7
// taps and a stride of 1, with two thirds of the direct products (five sevenths of 5 and 7 rows):
// microkernels/channel_columns_winograd.h.
#pragma once

#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// depthwise_columns_applies, the stride is 1, and rows are walked or their tiles overlap little.
bool depthwise_winograd_applies(const ConvView& view);

// Elements of the packed weights.
int64_t depthwise_winograd_weights_size(const ConvView& view);
void depthwise_winograd_pack_weights(const ConvView& view, const float* w, float* packed);

// The view applies and is not empty; packed: from depthwise_winograd_pack_weights, or null; bias
// may be null. Returns the samples that are to be computed another way: those with a sum that is
// not finite.
std::vector<int64_t> depthwise_winograd(const ConvView& view, const float* src, const float* w,
                                        const float* packed, const float* bias,
                                        const Epilogue<float>& epilogue, const Parallel& pool);

// The part of the direct products that it forms, for each column of a kernel of R rows.
double depthwise_winograd_products(const ConvView& view);

}  // namespace torchconv::cpu
