// Convolution of channels_last images by kernels of one row or column and at most a vector of
// filters: an element that is broadcast serves all taps.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether shared_taps computes the view, with most lanes and outputs of its tiles in use. pairs:
// of bfloat16, which it takes only so.
bool shared_taps_applies(const ConvView& view, bool pairs);

// Instantiated for float, and for bfloat16 in pairs of channels. bias may be null.
template <typename T>
void shared_taps(const ConvView& view, const T* src, const T* w, const T* bias,
                 const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
