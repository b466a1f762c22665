// The register tiles of channels_last convolutions in bfloat16: dot products of pairs of channels.
#include <cstdlib>
#include <cstring>

#include "cpu/microkernels/direct_tile.h"
#include "cpu/microkernels/pair_product.h"

#if defined(TORCHCONV_PAIR_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "cpu/microkernels/direct_even_impl.h"
#include "cpu/microkernels/direct_pair_run_impl.h"

namespace torchconv::cpu {

bool has_pair_products() {
  static const bool has = [] {
    const char* const wanted = std::getenv("TORCHCONV_PAIR_PRODUCTS");
    return __builtin_cpu_supports("avx512bf16") != 0 &&
           (wanted == nullptr || std::strcmp(wanted, "0") != 0);
  }();
  return has;
}

DirectMicrokernel<float> direct_pair_microkernel(int64_t rows, int64_t vectors) {
  return find_direct_tile<PairProduct>(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}

DirectMicrokernel<float> direct_even_pair_microkernel() { return direct_even_tile<PairProduct>; }

DirectMicrokernel<float> direct_pair_run_microkernel(int64_t vectors) {
  return vectors == 1 ? direct_pair_run<PairProduct, 1> : direct_pair_run<PairProduct, 2>;
}

}  // namespace torchconv::cpu

#pragma GCC pop_options
#else
namespace torchconv::cpu {

bool has_pair_products() { return false; }
DirectMicrokernel<float> direct_pair_microkernel(int64_t, int64_t) { std::abort(); }
DirectMicrokernel<float> direct_even_pair_microkernel() { std::abort(); }
DirectMicrokernel<float> direct_pair_run_microkernel(int64_t) { std::abort(); }

}  // namespace torchconv::cpu
#endif
