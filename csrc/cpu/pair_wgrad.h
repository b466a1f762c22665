// The weight gradient of bfloat16 convolutions by dot products of pairs of neighbouring pixels.
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Outputs that are summed in registers.
inline constexpr int64_t kPairWgradPixels = 384;

// Whether the processor has the products and the view (fprop's, with terms) is one for them.
bool pair_wgrad_applies(const ConvView& view);

// Writes dw. False where an element is not finite: padding that is multiplied by infinity or NaN
// gives NaN, so that the caller has to compute dw another way.
bool pair_wgrad(const ConvView& view, const BFloat16* dz, const BFloat16* x, BFloat16* dw,
                const Parallel& pool);

}  // namespace torchconv::cpu
