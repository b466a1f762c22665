// Any convolution pass from a tap list to a strided destination (fprop, one phase of dgrad), as a
// matrix product whose operands are packed on the fly.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// src has its channels contiguous. Elements of the packed weights: what they hold depends on the
// weights, C, K, the groups and the taps, not on the batch or the image.
template <typename T>
int64_t implicit_gemm_weights_size(const ConvView& view);

template <typename T>
void implicit_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                                const Parallel& pool);

// The grid must not be empty; the terms may be. packed: from implicit_gemm_pack_weights, or null;
// bias may be null. Instantiated for float, double, BFloat16 and Float16.
template <typename T>
void implicit_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                   const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
