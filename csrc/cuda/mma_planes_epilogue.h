// The epilogue of sums whose rows are outputs and whose columns are pixels of NCHW: threads of a
// quad exchange theirs, so that each has neighbours in memory.
#pragma once

#include "cuda/mma_epilogue.h"

namespace torchconv::cuda {

// Of the four values of `Words` words that each thread of a quad has, thread t receives the t-th
// ones, in the threads' order.
template <int Words, typename V>
__device__ __forceinline__ void turn_in_quad(V (&value)[4 * Words], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
#pragma unroll
      for (int e = 0; e < Words; ++e) {
        V &low = value[Words * i + e], &high = value[Words * (i | bit) + e];
        const V received = __shfl_xor_sync(~0u, upper ? low : high, bit);
        if (upper)
          low = received;
        else
          high = received;
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const T one = from_wide<T>(first), other = from_wide<T>(second);
  return *reinterpret_cast<const uint16_t*>(&one) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&other)) << 16;
}

// Each thread of a quad has four pairs of sums with their bias, of which the t-th make eight pixels
// side by side that thread t stores from element `at` on: `count` of them, at once where `vector`.
template <typename T>
__device__ __forceinline__ void store_pixels(float (&z)[8], const Epilogue<T>& epilogue, int lane,
                                             int64_t at, int count, bool vector) {
  if (epilogue.residual == nullptr && epilogue.preactivation == nullptr && vector) {
    if (epilogue.activation == Activation::kReLU) {
#pragma unroll
      for (int e = 0; e < 8; ++e) z[e] = activate(Activation::kReLU, z[e]);
    } else if (epilogue.activation != Activation::kNone) {
#pragma unroll
      for (int e = 0; e < 8; ++e) z[e] = activate_apart(epilogue.activation, z[e]);
    }
    uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = pack<T>(z[2 * j], z[2 * j + 1]);
    turn_in_quad<1>(word, lane);
    if (count > 0)
      *reinterpret_cast<Vector<uint32_t, 4>*>(epilogue.y +
                                              at) = {{word[0], word[1], word[2], word[3]}};
    return;
  }
  turn_in_quad<2>(z, lane);
  if (count <= 0) return;
  const auto load = [&](const T* from) {
    if (vector) return *reinterpret_cast<const Vector<T, 8>*>(from + at);
    Vector<T, 8> read{};
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < count) read.element[e] = from[at + e];
    return read;
  };
  finish(z, epilogue, load, [&](T* to, const Vector<T, 8>& rounded) {
    if (vector) {
      *reinterpret_cast<Vector<T, 8>*>(to + at) = rounded;
    } else {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) to[at + e] = rounded.element[e];
    }
  });
}

}  // namespace torchconv::cuda
