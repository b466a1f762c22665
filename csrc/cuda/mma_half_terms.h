// The matrix instruction of half types with eight terms, half of what tensor_core.h has.
#pragma once

#include "cuda/tensor_core.h"

namespace torchconv::cuda {

// sums += A * B of the first eight terms: words 0 and 1 of A, word 0 of B.
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[2], uint32_t b) {
#ifdef TORCHCONV_EMULATE_CUDA
  mma<T>(sums, {a[0], a[1], 0u, 0u}, b, 0u);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  __trap();
#else
#define TORCHCONV_MMA(shape_and_types)                                                             \
  asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                 \
      : "r"(a[0]), "r"(a[1]), "r"(b))
  if constexpr (std::is_same_v<T, Half>)
    TORCHCONV_MMA("m16n8k8.row.col.f32.f16.f16.f32");
  else
    TORCHCONV_MMA("m16n8k8.row.col.f32.bf16.bf16.f32");
#undef TORCHCONV_MMA
#endif
}

}  // namespace torchconv::cuda
