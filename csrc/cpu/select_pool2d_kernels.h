// Max and min pooling's kernels for one element type. Included only by the files that instantiate
// them, which are several only to compile side by side.
#pragma once

#include <type_traits>

#include "cpu/pool2d_layouts.h"
#include "cpu/select_pool2d.h"

namespace torchconv::cpu {

template <typename Rule, typename T>
void select_with(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected,
                 const Parallel& pool) {
  if (selected.data != nullptr) {
    pool2d_with<true>(p, rule, x, y, selected, pool);
  } else {
    pool2d_with<false>(p, rule, x, y, selected, pool);
  }
}

template <typename T>
void select_pool2d_as(const PoolProblem& p, LaneInt<T> mirror, const T* x, T* y,
                      SelectedArray selected, const Parallel& pool) {
  std::conditional_t<std::is_integral_v<T>, IntegerSelection<T>, Selection<T>> rule;
  rule.mirror = mirror;
  select_with(p, rule, x, y, selected, pool);
}

}  // namespace torchconv::cpu
