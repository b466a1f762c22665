// The tiles of shared_taps.h: dot products of pairs of channels.
#include <cstdlib>

#include "cpu/microkernels/pair_product.h"
#include "cpu/microkernels/shared_taps.h"

#if defined(TORCHCONV_PAIR_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "cpu/microkernels/shared_taps_impl.h"

namespace torchconv::cpu {

SharedTapsMicrokernel shared_taps_pair_microkernel(int64_t taps, bool one_line) {
  return find_shared_taps_tile<PairProduct>(taps, one_line);
}

}  // namespace torchconv::cpu

#pragma GCC pop_options
#else
namespace torchconv::cpu {

SharedTapsMicrokernel shared_taps_pair_microkernel(int64_t, bool) { std::abort(); }

}  // namespace torchconv::cpu
#endif
