// Convolution with few channels by Winograd's F(4,3), F(4,2) and F(4,1) along the rows, of each
// phase of the step: half of the multiplications or some more.
#pragma once

#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether winograd_rows computes the view: one group, neighbouring taps in each of a few rows,
// enough of them for the step to save a quarter of the multiplications.
bool winograd_rows_applies(const ConvView& view);
// The part of them that is left, with those of tiles beyond the end of a row.
double winograd_rows_products(const ConvView& view);

// The gather of one view. The problem must not be empty; bias may be null. Returns the samples that
// hold an infinity, a NaN or an overflow, as winograd_gather does.
std::vector<int64_t> winograd_rows(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool);

}  // namespace torchconv::cpu
