// The tile of direct_tile.h for a run of kMaxRows pixels, or several runs behind each other, that
// lie evenly apart, in the source and in the destination, each of them read through one tap.
//
// Terms are elements 0, 1, 2, ... from each pixel on, as of one tap without a band: it reads no
// table of them and none of pixels, which takes as long as several terms do. It takes vectors of
// half the width where AVX-512 would fill a single one to no more than half. So it does where a
// last one would be half empty, or one vector of filters bound by its loads, on processors whose
// products of whole vectors take twice as long (processor.h); on others a last panel of one vector
// is computed with the one before it, and two pixels share the last vector of 17 to 24 filters, or
// of 33 to 40. A term adds to each sum as it does there, so that either may compute a pixel.
#pragma once

#include <cstdint>

#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// Whether a last vector of filters that is at most half full takes half the time of a full one.
inline constexpr bool kRunsTakeHalves = kVectorBytes == 64;
// Whether a run takes the last panel, of so many filters, along with the whole one before it.
bool direct_run_joins(int64_t filters);
// Of the tile's tables of pixels and rows it reads the first alone. filters: of its last panel, or
// of a whole one and the one that joins it.
DirectMicrokernel<float> direct_run_microkernel(int64_t filters);

}  // namespace torchconv::cpu
