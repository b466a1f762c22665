// Max or min pooling of one element type: picks the kernel for the layout, with or without codes.
#pragma once

#include "cpu/pool2d_nchw.h"
#include "cpu/pool2d_nhwc.h"

namespace torchconv::cpu {

template <typename Rule, typename T>
void select_with(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected,
                 const Parallel& pool) {
  const bool codes = selected.data != nullptr;
  if (runs_channels_last(p)) {
    if (codes) {
      PoolPixels<Rule, true>(p, rule, x, y, selected).run(pool);
    } else {
      PoolPixels<Rule, false>(p, rule, x, y, selected).run(pool);
    }
  } else if (codes) {
    PoolPlanes<Rule, true>(p, rule, x, y, selected).run(pool);
  } else {
    PoolPlanes<Rule, false>(p, rule, x, y, selected).run(pool);
  }
}

}  // namespace torchconv::cpu
