// Max or min pooling of one element type: picks the kernel for the layout, with or without codes.
#pragma once

#include "cpu/pool2d_nchw.h"
#include "cpu/pool2d_nhwc.h"
#include "cpu/select_pool2d.h"

namespace torchconv::cpu {

template <typename T, bool kMin>
void select_pool2d_as(const PoolProblem& p, const T* x, T* y, SelectedArray selected,
                      const Parallel& pool) {
  if (runs_channels_last(p)) {
    if (selected.data != nullptr) {
      PoolPixels<Selection<T, kMin>, true>(p, x, y, selected).run(pool);
    } else {
      PoolPixels<Selection<T, kMin>, false>(p, x, y, selected).run(pool);
    }
  } else if (selected.data != nullptr) {
    PoolPlanes<Selection<T, kMin>, true>(p, x, y, selected).run(pool);
  } else {
    PoolPlanes<Selection<T, kMin>, false>(p, x, y, selected).run(pool);
  }
}

#define TORCHCONV_INSTANTIATE_SELECT(T)                                                     \
  template void select_pool2d_as<T, false>(const PoolProblem&, const T*, T*, SelectedArray, \
                                           const Parallel&);                                \
  template void select_pool2d_as<T, true>(const PoolProblem&, const T*, T*, SelectedArray,  \
                                          const Parallel&);

}  // namespace torchconv::cpu
