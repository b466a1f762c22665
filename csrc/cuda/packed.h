// Vectors that wait in registers as they were loaded: two of the half types share a register until
// an element is used, where the compiler would give an element of Vector one of its own.
#pragma once

#include <cstring>

#include "cuda/element.h"

namespace torchconv::cuda {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packed {
  static constexpr bool kPairs = sizeof(T) == 2 && kCount % 2 == 0;
  std::conditional_t<kPairs, uint32_t, T> word[kPairs ? kCount / 2 : kCount];

  __device__ __forceinline__ Wide<T> wide(int i) const {
    if constexpr (!kPairs) {
      return to_wide(word[i]);
    } else {
      const uint32_t pair = word[i / 2];
      if constexpr (std::is_same_v<T, BFloat16>) {
        const uint32_t bits = i % 2 == 0 ? pair << 16 : pair & 0xffff0000u;
        float value;
        memcpy(&value, &bits, sizeof(value));
        return value;
      } else {
        __half2 halves;
        memcpy(&halves, &pair, sizeof(halves));
        const float2 values = __half22float2(halves);
        return i % 2 == 0 ? values.x : values.y;
      }
    }
  }
};

}  // namespace torchconv::cuda
