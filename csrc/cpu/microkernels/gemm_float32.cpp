// The register-tile product in float.
#include "cpu/microkernels/gemm_impl.h"

namespace torchconv::cpu {

template <>
GemmMicrokernel<float> gemm_microkernel<float>(int64_t rows, int64_t vectors) {
  return find_gemm_tile<float, false>(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}

template <>
GemmMicrokernel<float> indirect_gemm_microkernel<float>(int64_t rows, int64_t vectors) {
  return find_gemm_tile<float, true>(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}

}  // namespace torchconv::cpu
