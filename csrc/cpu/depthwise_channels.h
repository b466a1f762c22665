// Depthwise convolution with channels contiguous (NHWC), straight from the image: no copy at all.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// One channel in a group, channels contiguous, and at least a vector of them.
template <typename T>
bool depthwise_channels_applies(const ConvView& view);

// The view applies and is not empty. bias may be null. T is float, double,
// BFloat16 or Float16.
template <typename T>
void depthwise_channels_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                               const Epilogue<T>& epilogue, const Parallel& pool);

// view is fprop's. Writes only the taps in the view.
template <typename T>
void depthwise_channels_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                              const Parallel& pool);

}  // namespace torchconv::cpu
