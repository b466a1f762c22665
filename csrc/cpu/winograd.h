// 3x3 and 5x5 convolution of step 1, with any dilation, by Winograd's F(4x4,3x3) and F(2x2,5x5): a
// quarter and little more than a third of the multiplications. In double for images of double, else
// in float.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the view is one that winograd_gather computes: nine or 25 taps in a square.
bool winograd_applies(const ConvView& view);

// Multiplications for a sample, a channel and a filter.
int64_t winograd_products(const ConvView& view);

// Weights in a form worth keeping from call to call: how many elements, and what fills them. It
// depends on the weights, C, K, the strides of the weights, the order of the taps and whether the
// tiles are few. No elements: nothing is worth keeping, unless the weights are frozen and need not
// be read beside it.
template <typename T>
int64_t winograd_weights_size(const ConvView& view, bool frozen);
template <typename T>
void winograd_pack_weights(const ConvView& view, const T* w, Wide<T>* packed, const Parallel& pool);

// The gather of one view (see conv_view.h). packed: from winograd_pack_weights, or null. A tile
// mixes its inputs, so an infinity, a NaN or an overflow may reach outputs whose window does not
// hold it, but never without making them infinite or NaN. The samples with such an output are
// returned, in ascending order, and what was written for them is not to be trusted: the caller has
// to compute them in another way. Instantiated for float, double, BFloat16 and Float16.
template <typename T>
std::vector<int64_t> winograd_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                                     const Epilogue<T>& epilogue, const Parallel& pool,
                                     const Wide<T>* packed = nullptr);

}  // namespace torchconv::cpu
