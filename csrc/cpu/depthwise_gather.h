// Convolution with few channels in a group, down to one (depthwise), from a tap list: fprop and the
// phases of dgrad.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/depthwise_band.h"

namespace torchconv::cpu {

// band must fit. bias may be null. Instantiated for float, double, BFloat16 and Float16.
template <typename T>
void depthwise_gather(const ConvView& view, const DepthwiseBand& band, const T* src, const T* w,
                      const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
