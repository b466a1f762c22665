// The destination side of strided Winograd: products to outputs, bias and epilogue.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/source_prefetch.h"
#include "cpu/winograd_strided_tiles.h"

namespace torchconv::cpu::winograd_strided {

// Scratch for transform_products.
int64_t product_scratch(const Plan& plan, int64_t slots);

// Writes the outputs of one segment of a block and of one panel from m, with bias[kFilters] of the
// panel added. False where an output, before its bias, is infinite or NaN: it is then not to be
// trusted.
bool transform_products(const Plan& plan, const TileBlock& block, const Segment& segment,
                        int64_t panel, const ProductLayout& layout, const float* m,
                        const float* bias, const Epilogue<float>& epilogue, float* scratch);

// What they read or write of some filters, at y or the residual.
void prefetch_outputs(const Plan& plan, const Segment& segment, Range filters, const float* first,
                      SourcePrefetch& ahead);

}  // namespace torchconv::cpu::winograd_strided
