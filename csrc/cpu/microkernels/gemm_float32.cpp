// The register-tile product in float.
#include "cpu/microkernels/gemm_impl.h"

namespace torchconv::cpu {

template <>
GemmMicrokernel<float> gemm_microkernel<float>(int64_t rows, int64_t vectors) {
  return find_gemm_tile<BandProduct<float>>(rows, vectors,
                                            std::make_integer_sequence<int, kMaxRows>());
}

}  // namespace torchconv::cpu
