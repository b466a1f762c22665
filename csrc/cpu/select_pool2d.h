// Max and min pooling of one element type, instantiated in select_pool2d_float.cpp and
// select_pool2d_integer.cpp.
#pragma once

#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// selected.data may be null.
template <typename T>
void select_pool2d_as(const PoolProblem& p, Select select, const T* x, T* y, SelectedArray selected,
                      const Parallel& pool);

}  // namespace torchconv::cpu
