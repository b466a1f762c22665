// The register-tile product of a band (gemm.h) for pairs of bfloat16 channels: a term is the 32
// bits of an element, and the sums are float. See has_pair_products.
#pragma once

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

inline constexpr int kMaxPairRows = 8;

// 1 <= rows <= kMaxPairRows, 1 <= vectors <= kMaxVectors.
GemmMicrokernel<float> gemm_pair_microkernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
