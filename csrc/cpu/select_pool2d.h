// Max and min pooling of one element type, values and, where wanted, selections. It is declared
// apart from its kernels (select_pool2d_kernels.h) so that select_pool2d.cpp does not compile them:
// the instances are in select_pool2d_float.cpp, select_pool2d_half.cpp and
// select_pool2d_integer.cpp.
#pragma once

#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// The maximum of values whose bits `mirror` has changed, as the rules of pool2d_rules.h do.
// selected.data may be null.
template <typename T>
void select_pool2d_as(const PoolProblem& p, LaneInt<T> mirror, const T* x, T* y,
                      SelectedArray selected, const Parallel& pool);

}  // namespace torchconv::cpu
