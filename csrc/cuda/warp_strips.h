// Depthwise weight gradients whose warps work alone: how strips of images are shared among them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/range.h"

namespace torchconv::cuda {

// A strip, one of `strips` of the batch for each tile of channels, is cut into sets of set_steps
// steps. A warp takes `each` sets, a block `warps` times as many, which is a slice.
struct WarpStrips {
  int64_t sets, set_steps, each, warps, slices;
};

// Costs are in rows that a warp loads: step_rows for each step, and `again` for those that two sets
// meet. The slices of all tiles are at most `blocks` blocks, which fill a large device, but a warp
// takes at most most_steps steps.
inline WarpStrips warp_strips(int64_t strips, int64_t steps, int64_t tiles, int64_t blocks,
                              int64_t step_rows, int64_t again, int64_t most_warps,
                              int64_t most_steps) {
  const int64_t most_slices = std::max<int64_t>(blocks / tiles, 1);
  WarpStrips best{};
  int64_t least = 0;
  for (int64_t sets = 1; sets <= steps; ++sets) {
    const int64_t set_steps = ceil_div(steps, sets);
    if (ceil_div(steps, set_steps) != sets) continue;
    const int64_t share = ceil_div(strips * sets, most_slices);
    const int64_t rounds = ceil_div(share, most_warps);
    const int64_t cost = rounds * (set_steps * step_rows + again);
    if (least != 0 && cost >= least) continue;
    least = cost;
    const int64_t each = std::min(rounds, std::max<int64_t>(most_steps / set_steps, 1));
    const int64_t warps = std::min(ceil_div(share, each), most_warps);
    best = {sets, set_steps, each, warps, ceil_div(strips * sets, warps * each)};
  }
  return best;
}

}  // namespace torchconv::cuda
