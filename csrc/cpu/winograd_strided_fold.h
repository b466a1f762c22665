// What is particular to kernels that fold (winograd_strided_tiles.h): the phases of a unit as
// channels. Channel (2*a + b)*C + c is channel c at row a and column b of the unit.
#pragma once

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/winograd_strided_tiles.h"

namespace torchconv::cpu::winograd_strided {

// As transform_weights does.
void transform_folded_weights(const Plan& plan, const float* w, int64_t panel, int64_t block,
                              float* u);

// Scratch for fold_source, and the size of its band: [height][width] pixels of all vectors of
// channels, which ends in a vector that may be overwritten.
int64_t fold_scratch(const Plan& plan, int64_t width);
int64_t folded_band_size(const Plan& plan, int64_t height, int64_t width);
// Folds a window of one sample, at src, that begins at units (h, w).
void fold_source(const Plan& plan, const float* src, int64_t h, int64_t w, int64_t height,
                 int64_t width, float* band, float* scratch);

// Writes `rows` x `columns` outputs to dst, from a band of units [row][column]
// [kFilters] whose rows have `units` columns. scratch: kFilters * odd_lines(units) elements.
void unfold_band(const Plan& plan, const float* band, int64_t units, int64_t rows, int64_t columns,
                 float* dst, float* scratch);

}  // namespace torchconv::cpu::winograd_strided
