// Max and min pooling, one function per element type.
#pragma once

#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// All of max or min pooling for one element type; selected.data may be null. Instantiated in
// select_pool2d_float.cpp and select_pool2d_integer.cpp.
template <typename T, bool kMin>
void select_pool2d_as(const PoolProblem& p, const T* x, T* y, SelectedArray selected,
                      const Parallel& pool);

}  // namespace torchconv::cpu
