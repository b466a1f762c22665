// The matrix instruction of half types with eight terms, half of those of tensor_core.h.
#pragma once

#include "cuda/tensor_core.h"

#ifndef TORCHCONV_EMULATE_CUDA
namespace torchconv::cuda {

// sums += A * B of the first eight terms: words 0 and 1 of A, and word 0 of B. Half and BFloat16.
template <typename T>
__device__ __forceinline__ void mma_of_8(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
#define TORCHCONV_MMA(types)                                       \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." types                \
      ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) \
      : "r"(a0), "r"(a1), "r"(b))
  if constexpr (std::is_same_v<T, Half>)
    TORCHCONV_MMA("f16.f16");
  else
    TORCHCONV_MMA("bf16.bf16");
#undef TORCHCONV_MMA
#endif
}

}  // namespace torchconv::cuda
#endif
