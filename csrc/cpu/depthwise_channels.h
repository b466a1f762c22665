// Depthwise convolution with channels contiguous (NHWC), straight from the image: no copy at all.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// One channel in a group, channels contiguous, and at least a vector of them.
template <typename A>
bool depthwise_channels_applies(const ConvView& view);

// The view applies and is not empty. bias may be null. A is float or double.
template <typename A>
void depthwise_channels_gather(const ConvView& view, const A* src, const A* w, const A* bias,
                               const Epilogue<A>& epilogue, const Parallel& pool);

// view is fprop's. Writes only the taps in the view.
template <typename A>
void depthwise_channels_wgrad(const ConvView& view, const A* dz, const A* x, A* dw,
                              const Parallel& pool);

}  // namespace torchconv::cpu
