// fprop and dgrad from bands of image rows with vectors along filters, see band_gemm.cpp.
#pragma once

#include "cpu/activation.h"
#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Terms of a reduction block: a panel of weights and what a tile reads of the band share the
// first-level cache.
inline constexpr int64_t kBandBlockTerms = 128;

// src must have its pixels contiguous. False for kernels that reach too far for a band.
bool band_gemm_applies(const ConvView& view, int64_t element_size);

// Elements of the packed weights. What they hold depends on the weights, C, K, the groups and the
// taps, not on the batch or the image.
template <typename T>
int64_t band_gemm_weights_size(const ConvView& view);

template <typename T>
void band_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                            const Parallel& pool);

// packed: from band_gemm_pack_weights, or null; bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void band_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed, const T* bias,
               const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
