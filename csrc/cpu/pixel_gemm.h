// fprop and dgrad as a matrix product along pixels, see pixel_gemm.cpp.
#pragma once

#include "cpu/activation.h"
#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Elements of the packed weights. What they hold depends on the weights, C, K, the groups and the
// taps, not on the batch or the image.
int64_t pixel_gemm_weights_size(const ConvView& view);

template <typename T>
void pixel_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                             const Parallel& pool);

// Whether so few pixels meet the weights that each task owns filters and packs them, a tile at a
// time, which no other thread then has to read: less than reading both these weights, to know that
// they have not changed, and packed ones.
bool pixel_gemm_packs_along(const ConvView& view);

// packed: from pixel_gemm_pack_weights, or null; bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void pixel_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
