// What ends a register tile whose sums are clamped.
#pragma once

#include "cpu/simd.h"

namespace torchconv::cpu {

// To [low, high], with NaN kept.
template <int kRows, int kVectors, typename Register>
TORCHCONV_INLINE void clamp_sums(Register (&sum)[kRows][kVectors], Register low, Register high) {
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = sum[m][v] < low ? low : sum[m][v];
      sum[m][v] = sum[m][v] > high ? high : sum[m][v];
    }
}

}  // namespace torchconv::cpu
