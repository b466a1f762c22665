// The weight side of Winograd's convolution: U = G g G^T for a panel of filters.
#pragma once

#include <cstdint>

#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Transforms the filters of one panel and the channels of one block into u, [point][channel]
// [kFilters]; filters and channels beyond the last are zero.
void transform_weights(const Plan& plan, const float* w, int64_t panel, int64_t block, float* u);

// Where the nine taps of a filter's channel lie.
using TapOffsets = int64_t[kTaps * kTaps];

// g[channel][tap][kFilters] of `channels` channels, at most a vector, from the weights at w; zero
// beyond `filters`.
void gather_taps(const ConvView& view, const TapOffsets& offsets, const float* w, int64_t filters,
                 int64_t channels, float* g);

// Fetches the i-th part in kVector of the weights of a vector of channels of a panel, at w. They
// lie in many short runs, which the hardware does not foresee.
void prefetch_weights(const ConvView& view, const TapOffsets& offsets, const float* w, int64_t i);

}  // namespace torchconv::cpu::winograd
