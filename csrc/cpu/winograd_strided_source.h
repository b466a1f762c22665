// The source side of strided Winograd: the tiles of a block into V.
#pragma once

#include <cstdint>

#include "cpu/winograd_strided_tiles.h"

namespace torchconv::cpu::winograd_strided {

// Scratch for transform_source.
int64_t source_scratch(const Plan& plan, int64_t slots);

// Transforms the tiles of one segment of a block, for all channels, into v.
void transform_source(const Plan& plan, const TileBlock& block, const Segment& segment,
                      const float* src, const SourceLayout& layout, float* scratch, float* v);

}  // namespace torchconv::cpu::winograd_strided
