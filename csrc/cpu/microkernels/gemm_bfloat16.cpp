// The register-tile product of a band in bfloat16: dot products of pairs of channels.
#include <cstdlib>

#include "cpu/microkernels/gemm_pairs.h"
#include "cpu/microkernels/pair_product.h"

#if defined(TORCHCONV_PAIR_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "cpu/microkernels/gemm_impl.h"

namespace torchconv::cpu {

GemmMicrokernel<float> gemm_pair_microkernel(int64_t rows, int64_t vectors) {
  return find_gemm_tile<PairProduct>(rows, vectors,
                                     std::make_integer_sequence<int, kMaxPairRows>());
}

}  // namespace torchconv::cpu

#pragma GCC pop_options
#else
namespace torchconv::cpu {

GemmMicrokernel<float> gemm_pair_microkernel(int64_t, int64_t) { std::abort(); }

}  // namespace torchconv::cpu
#endif
