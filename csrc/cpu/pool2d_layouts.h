// Pooling by one rule, forward: picks the kernel for the layout and the shape. A kernel written for
// particular windows (2x2, 3x3, ...) joins here, before the general ones, with a condition of its
// own as PoolGlobal has.
#pragma once

#include <type_traits>

#include "cpu/pool2d_global.h"
#include "cpu/pool2d_large.h"
#include "cpu/pool2d_nchw.h"
#include "cpu/pool2d_nhwc.h"
#include "cpu/pool2d_strided.h"

namespace torchconv::cpu {

template <bool kCodes, typename Rule, typename T>
void pool2d_with(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected,
                 const Parallel& pool) {
  // The integers, which no network pools by large windows, keep the library small.
  if constexpr (!std::is_integral_v<T>) {
    if (LargeWindows::applies(p, Rule::kLanes, kCodes))
      return pool2d_large<kCodes>(p, rule, x, y, selected, pool);
    if (!runs_channels_last(p) && PoolGlobal<Rule, kCodes>::applies(p))
      return PoolGlobal<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  }
  if (runs_channels_last(p)) {
    PoolPixels<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  } else if (PoolStrided<Rule, kCodes>::applies(p)) {
    PoolStrided<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  } else {
    PoolPlanes<Rule, kCodes>(p, rule, x, y, selected).run(pool);
  }
}

}  // namespace torchconv::cpu
