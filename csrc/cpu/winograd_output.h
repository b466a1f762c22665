// The destination side of Winograd's convolution: A^T m A, bias and epilogue for the tiles of a
// block.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Whether a lane is NaN.
bool has_nan(Vec<float>::Type lanes);

// Scratch for transform_products.
int64_t product_scratch(const Plan& plan, int64_t slots);

// Writes the outputs of one segment and panel from m, with bias[kFilters] of the panel added.
// False where an output, before its bias, is infinite or NaN: it is then not to be trusted.
// Instantiated for float, BFloat16 and Float16, as store_band is.
template <typename T>
bool transform_products(const Plan& plan, const Segment& segment, int64_t panel, const float* m,
                        const float* bias, const Epilogue<T>& epilogue, float* scratch);

// Sends finished outputs, [row][column][kFilters] in a band, to where they belong: the first of
// `filters` at the first pixel to element dst. The band has band_size elements and is overwritten.
template <typename T>
void store_band(const ConvStrides& strides, int64_t dst, int64_t filters, int64_t rows,
                int64_t columns, const Epilogue<T>& epilogue, float* band);
int64_t band_size(int64_t pixels);

}  // namespace torchconv::cpu::winograd
