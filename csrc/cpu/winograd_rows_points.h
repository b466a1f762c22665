// winograd_rows.h for many terms: where the weights of a vector of filters and the points of some
// tiles no longer fit the first-level cache, registers that hold all points of a few tiles read
// both again and again from the second. Here each point is a matrix product of its own, of many
// tiles by a panel of filters, and the inverse transform reads its sums from memory.
#pragma once

#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu::winograd::rows {

// Whether that takes less time than registers that hold all points.
bool points_apart(const ConvView& view);

// As winograd_rows.
std::vector<int64_t> gather_points(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool);

}  // namespace torchconv::cpu::winograd::rows
