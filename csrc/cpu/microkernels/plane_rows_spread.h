// plane_rows_sum for PlaneRows::kSpread.
#pragma once

#include "cpu/microkernels/plane_rows.h"

namespace torchconv::cpu {

template <typename A>
void plane_rows_spread(const PlaneRows& shape, const PlaneRowsSum<A>& sum);

}  // namespace torchconv::cpu
