// The register-tile product in double.
#include "cpu/microkernels/gemm_impl.h"

namespace torchconv::cpu {

template <>
GemmMicrokernel<double> gemm_microkernel<double>(int64_t rows, int64_t vectors) {
  return find_gemm_tile<BandProduct<double>>(rows, vectors,
                                             std::make_integer_sequence<int, kMaxRows>());
}

}  // namespace torchconv::cpu
