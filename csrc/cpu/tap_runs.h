// Convolution of channels_last images of few channels, read where they lie: those of the taps of a
// kernel row are neighbours.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether tap_runs computes the view: channels_last images, one group, few channels, and a kernel
// whose columns are neighbours.
bool tap_runs_applies(const ConvView& view);

// The gather of one view. The problem must not be empty; bias may be null.
void tap_runs(const ConvView& view, const float* src, const float* w, const float* bias,
              const Epilogue<float>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
