// plane_rows_sum for kernels and steps that have no rolling rows: microkernels/plane_rows.h.
#pragma once

#include "cpu/microkernels/plane_rows.h"

namespace torchconv::cpu {

inline constexpr int64_t kMostStepsRows = 7;

// R up to kMostStepsRows, steps of 1 to 4, no dilation.
template <typename A>
void plane_rows_steps(const PlaneRows& shape, const PlaneRowsSum<A>& sum);

}  // namespace torchconv::cpu
