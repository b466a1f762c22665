// The weight side of strided Winograd.
#pragma once

#include <cstdint>

#include "cpu/winograd_strided_tiles.h"

namespace torchconv::cpu::winograd_strided {

// Transforms the filters of one panel and the channels of one block into u, [plane][channel]
// [kFilters]. The last vector of filters and the last of channels are filled up with zeros; nothing
// is written beyond.
// streams: the stores to u.
void transform_weights(const Plan& plan, const float* w, int64_t panel, int64_t block, float* u,
                       bool streams);

}  // namespace torchconv::cpu::winograd_strided
