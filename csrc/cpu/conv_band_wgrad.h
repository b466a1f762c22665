// The weight gradient of a convolution with few channels in a group, down to one (depthwise).
#pragma once

#include "core/parallel.h"
#include "cpu/conv_band.h"

namespace torchconv::cpu {

// view is fprop's and not empty; band must fit. Writes only the taps in the view. Instantiated for
// float, double, BFloat16 and Float16.
template <typename T>
void band_wgrad(const ConvView& view, const ConvBand& band, const T* dz, const T* x, T* dw,
                const Parallel& pool);

}  // namespace torchconv::cpu
