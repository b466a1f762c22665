// 1x1 convolution of bfloat16 planes as they lie: a matrix product by dot products of pairs of
// channels whose vectors run along pixels, so that neither image is transposed.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the processor has the products, pixels are neighbours in both images, the only tap moves
// with them, and they fill whole vectors of a sample, or nearly.
bool plane_pairs_applies(const ConvView& view);

// Elements of the packed weights, [group][filter][pair of channels], rows padded.
int64_t plane_pairs_weights_size(const ConvView& view);
void plane_pairs_pack_weights(const ConvView& view, const BFloat16* w, float* packed,
                              const Parallel& pool);

// packed: from plane_pairs_pack_weights, or null; bias may be null.
void plane_pairs(const ConvView& view, const BFloat16* src, const BFloat16* w, const float* packed,
                 const BFloat16* bias, const Epilogue<BFloat16>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
