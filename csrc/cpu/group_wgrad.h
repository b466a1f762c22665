// wgrad with few channels in a group, see group_wgrad.cpp.
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Where group_band_applies (group_gather.h). Products with the padding are formed: False
// where any of the gradient is not finite, for an infinity or a NaN may have reached too much.
// Instantiated for float, double, BFloat16 and Float16.
template <typename T>
bool group_wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool);

// The same by Winograd's algorithm, where group_winograd_applies (group_winograd.h).
bool group_winograd_wgrad(const ConvView& view, const float* dz, const float* x, float* dw,
                          const Parallel& pool);

}  // namespace torchconv::cpu
