// The destination side of Winograd's convolution: A^T m A, bias and epilogue for the tiles of a
// block.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Scratch for transform_products.
int64_t product_scratch(const Plan& plan, int64_t slots);

// Writes the outputs of one segment and panel from m, with bias[kFilters] of the panel added.
// False where an output, before its bias, is infinite or NaN: it is then not to be trusted.
bool transform_products(const Plan& plan, const Segment& segment, int64_t panel, const float* m,
                        const float* bias, const Epilogue<float>& epilogue, float* scratch);

}  // namespace torchconv::cpu::winograd
