// How a reduction is cut into blocks: the half of packing that knows only shapes.
#include "cpu/conv_pack.h"

namespace torchconv::cpu {

std::vector<ReductionBlock> reduction_blocks(int64_t C, int64_t T, int64_t limit, bool taps_inner) {
  std::vector<ReductionBlock> blocks;
  if (C == 0 || T == 0) return blocks;
  const int64_t inner = taps_inner ? T : C;
  const int64_t outer = taps_inner ? C : T;
  // Even blocks: a short last one would cost as much to add up as a full one.
  const int64_t inner_size = ceil_div(inner, ceil_div(inner, limit));
  const int64_t outer_limit = std::max<int64_t>(limit / inner_size, 1);
  const int64_t outer_size = inner_size < inner ? 1 : ceil_div(outer, ceil_div(outer, outer_limit));
  for (int64_t o = 0; o < outer; o += outer_size) {
    for (int64_t i = 0; i < inner; i += inner_size) {
      const int64_t on = std::min(outer_size, outer - o), in = std::min(inner_size, inner - i);
      blocks.push_back(taps_inner ? ReductionBlock{o, on, i, in} : ReductionBlock{i, in, o, on});
    }
  }
  return blocks;
}

}  // namespace torchconv::cpu
