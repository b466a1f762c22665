// The weight gradient of a convolution with few channels in a group, down to one (depthwise).
#pragma once

#include "core/parallel.h"
#include "cpu/conv_band.h"

namespace torchconv::cpu {

// The band that fits view, which is fprop's: as many rows as suits the caches and the threads.
ConvBand band_wgrad_band(const ConvView& view, bool along_pixels, int64_t element_size,
                         int64_t vector_lanes);

// view is fprop's and not empty; its band must fit. Writes only the taps in the view. False where
// any of the gradient is not finite: pixels that no window holds are multiplied by zero, which
// infinity and NaN survive. Instantiated for float, double, BFloat16 and Float16.
template <typename T>
bool band_wgrad(const ConvView& view, bool along_pixels, const T* dz, const T* x, T* dw,
                const Parallel& pool);

}  // namespace torchconv::cpu
