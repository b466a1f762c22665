// The epilogue of a tile of finished sums in registers.
#pragma once

#include "cuda/activation.h"

namespace torchconv::cuda {

// z = g(z) for all of a register tile. The costly activations stand once in the code for kStep
// values, not once for each: the tile goes round through the first kStep registers.
template <int kStep, int kCount, typename A>
__device__ __forceinline__ void activate_tile(Activation activation, A (&z)[kCount]) {
  static_assert(kCount % kStep == 0);
  if (activation == Activation::kNone) return;
  if (activation == Activation::kReLU || activation == Activation::kReLU6) {
    const bool cut = activation == Activation::kReLU6;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      z[i] = z[i] < A{0} ? A{0} : z[i];
      z[i] = cut && z[i] > A{6} ? A{6} : z[i];
    }
    return;
  }
#pragma unroll 1
  for (int round = 0; round < kCount / kStep; ++round) {
    A done[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) done[i] = activate(activation, z[i]);
#pragma unroll
    for (int i = 0; i < kCount - kStep; ++i) z[i] = z[i + kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) z[kCount - kStep + i] = done[i];
  }
}

}  // namespace torchconv::cuda
