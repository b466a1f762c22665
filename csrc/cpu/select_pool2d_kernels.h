// Max and min pooling's kernels for one element type. Included only by the files that instantiate
// them, which are several only to compile side by side.
//
// The integer types compute in int32_t or int64_t lanes. Their minimum is the maximum of the
// complements, that of all but float32 the maximum of the negatives: chosen at run time to keep the
// library small.
#pragma once

#include <limits>
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
void select_pool2d_as(const PoolProblem& p, Select select, const T* x, T* y, SelectedArray selected,
                      const Parallel& pool) {
  if constexpr (std::is_integral_v<T>) {
    IntegerSelection<T> rule;
    rule.mirror = select == Select::kMax ? 0 : -1;
    select_with(p, rule, x, y, selected, pool);
  } else if constexpr (!std::is_same_v<T, float>) {
    MirroredSelection<T> rule;
    using Code = typename MirroredSelection<T>::Code;
    rule.mirror = select == Select::kMax ? 0 : std::numeric_limits<Code>::min();
    select_with(p, rule, x, y, selected, pool);
  } else if (select == Select::kMax) {
    select_with(p, Selection<T, false>(), x, y, selected, pool);
  } else {
    select_with(p, Selection<T, true>(), x, y, selected, pool);
  }
}

}  // namespace torchconv::cpu
