// Convolution of images of a single pixel, with the weights where they lie.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Terms summed in registers where filters are neighbours: as many rows of weights, in as many
// pages.
inline constexpr int64_t kSampleRows = 64;

// Whether sample_gemm computes the view: one tap, one pixel, one group, and channels or filters are
// neighbours among the weights.
bool sample_gemm_applies(const ConvView& view);

// The view has terms and must not be empty. bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void sample_gemm(const ConvView& view, const T* src, const T* w, const T* bias,
                 const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
