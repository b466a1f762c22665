// Convolution of NCHW images of few channels or by few filters, read where they lie, see
// plane_taps.cpp.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether plane_taps computes the view: NCHW images, one group, columns that follow each other, and
// weights that leave room in the first-level cache.
bool plane_taps_applies(const ConvView& view);

// The gather of one view. The problem must not be empty; bias may be null.
void plane_taps(const ConvView& view, const float* src, const float* w, const float* bias,
                const Epilogue<float>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
