// Convolution with few channels and three columns of taps, of step 1 along a row, by Winograd's
// F(4,3) along the rows: half of the multiplications.
#pragma once

#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether winograd_rows computes the view: one group, three neighbouring taps in each of a few
// rows.
bool winograd_rows_applies(const ConvView& view);

// The gather of one view. The problem must not be empty; bias may be null. Returns the samples that
// hold an infinity, a NaN or an overflow, as winograd_gather does.
std::vector<int64_t> winograd_rows(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool);

}  // namespace torchconv::cpu
