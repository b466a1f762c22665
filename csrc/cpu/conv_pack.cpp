// How a reduction is cut into blocks: the half of packing that knows only shapes.
#include "cpu/conv_pack.h"

namespace torchconv::cpu {

std::vector<ReductionBlock> reduction_blocks(int64_t C, int64_t T, int64_t limit) {
  std::vector<ReductionBlock> blocks;
  if (C == 0 || T == 0) return blocks;
  // Even blocks: a short last one would cost as much to add up as a full one.
  const int64_t taps = ceil_div(T, ceil_div(T, limit));
  const int64_t most = std::max<int64_t>(limit / taps, 1);
  const int64_t channels = taps < T ? 1 : ceil_div(C, ceil_div(C, most));
  for (int64_t c = 0; c < C; c += channels)
    for (int64_t t = 0; t < T; t += taps)
      blocks.push_back({c, std::min(channels, C - c), t, std::min(taps, T - t)});
  return blocks;
}

}  // namespace torchconv::cpu
