// plane_rows_sum and plane_rows_dot for kernels and steps that have no rolling rows.
#pragma once

#include "cpu/microkernels/plane_rows.h"

namespace torchconv::cpu {

inline constexpr int64_t kMostStepsRows = 7;
// Rows of the kernel, times the steps that its columns span, of plane_rows_steps_dot.
inline constexpr int kMostStepsTerms = 4;

// R up to kMostStepsRows, steps of 1 to 4, no dilation.
template <typename A>
void plane_rows_steps(const PlaneRows& shape, const PlaneRowsSum<A>& sum);
// The same with at most so many terms.
template <typename A>
void plane_rows_steps_dot(const PlaneRows& shape, const PlaneRowsDot<A>& dot);

}  // namespace torchconv::cpu
