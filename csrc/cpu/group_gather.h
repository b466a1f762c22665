// fprop and dgrad with few channels in a group, see group_gather.cpp.
#pragma once

#include <vector>

#include "cpu/activation.h"
#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Whether a band of the images fits a cache, and channels or pixels are neighbours. The view has
// taps.
bool group_band_applies(const ConvView& view, int64_t element_size);

// Elements of the packed weights. What they hold depends on the weights, C, K, the groups and the
// taps, not on the batch or the image.
template <typename T>
int64_t group_weights_size(const ConvView& view);

template <typename T>
void group_pack_weights(const ConvView& view, const T* w, Wide<T>* packed, const Parallel& pool);

// packed: from group_pack_weights, or null; bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void group_gather(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                  const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

// dgrad of a stride: all its views, which cover dx, from the same bands, so that whole rows of dx
// are written at a time.
bool group_dgrad_applies(const std::vector<ConvView>& views, int64_t element_size);
template <typename T>
void group_dgrad(const ConvProblem& p, const std::vector<ConvView>& views, const T* dz, const T* w,
                 T* dx, const Parallel& pool);

}  // namespace torchconv::cpu
