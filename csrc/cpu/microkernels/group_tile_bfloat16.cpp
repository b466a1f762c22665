// The tiles of grouped convolution in bfloat16: dot products of pairs of channels.
#include <cstdlib>

#include "cpu/microkernels/group_tile.h"
#include "cpu/microkernels/pair_product.h"

#if defined(TORCHCONV_PAIR_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "cpu/microkernels/group_tile_impl.h"

namespace torchconv::cpu {

GroupSumKernel<float> group_pair_sum_kernel(int64_t taps, int64_t step, int64_t tile) {
  return find_group_sum<PairProduct, false>(taps, step, tile);
}

}  // namespace torchconv::cpu

#pragma GCC pop_options
#else
namespace torchconv::cpu {

GroupSumKernel<float> group_pair_sum_kernel(int64_t, int64_t, int64_t) { std::abort(); }

}  // namespace torchconv::cpu
#endif
