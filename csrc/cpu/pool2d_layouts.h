// Pooling by one rule: picks the kernel for the layout and the shape, with or without selections.
#pragma once

#include "cpu/pool2d_global.h"
#include "cpu/pool2d_nchw.h"
#include "cpu/pool2d_nhwc.h"

namespace torchconv::cpu {

template <bool kCodes, typename Rule, typename T>
void pool2d_with(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected,
                 const Parallel& pool) {
  if (runs_channels_last(p)) {
    PoolPixels<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  } else if (PoolGlobal<Rule, kCodes>::applies(p)) {
    PoolGlobal<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  } else {
    PoolPlanes<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  }
}

}  // namespace torchconv::cpu
