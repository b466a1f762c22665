// Convolution of channels_last images with few filters: inner products along channels.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether inner_gather computes the view: one group, and channels are neighbours in both images.
bool inner_gather_applies(const ConvView& view);

// The part of the lanes that hold a term, away from the image's edges.
double inner_gather_lanes_used(const ConvView& view, int64_t vector_lanes);

// The problem must not be empty. bias may be null. Instantiated for float and double.
template <typename T>
void inner_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                  const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
