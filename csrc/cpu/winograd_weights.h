// The weight side of Winograd's convolution: U = G g G^T for a panel of filters.
#pragma once

#include <cstdint>

#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Transforms the filters of one panel and the channels of one block into u, [point][channel]
// [kFilters]; filters and channels beyond the last are zero.
void transform_weights(const Plan& plan, const float* w, int64_t panel, int64_t block, float* u);

}  // namespace torchconv::cpu::winograd
