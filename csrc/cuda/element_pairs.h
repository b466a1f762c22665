// Two elements of a half type side by side in a word: compared, chosen and added at once, with the
// results that floats would give. A mask has all bits of a half set, or none.
#pragma once

#include <cstring>

#include "cuda/element.h"

namespace torchconv::cuda {

template <typename T>
__device__ __forceinline__ T low_of(uint32_t pair) {
  const auto bits = static_cast<uint16_t>(pair);
  T v;
  memcpy(&v, &bits, sizeof(T));
  return v;
}
template <typename T>
__device__ __forceinline__ T high_of(uint32_t pair) {
  return low_of<T>(pair >> 16);
}
template <typename T>
__device__ __forceinline__ uint32_t pair_of(T low, T high) {
  uint16_t bits[2];
  memcpy(bits, &low, sizeof(T));
  memcpy(bits + 1, &high, sizeof(T));
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

// A word's two halves: element `low` of the first and `high` of the second, 0 or 1 each.
__device__ __forceinline__ uint32_t pick(uint32_t first, int low, uint32_t second, int high) {
  return __byte_perm(first, second, (low ? 0x32u : 0x10u) | (high ? 0x7600u : 0x5400u));
}
__device__ __forceinline__ uint32_t choose(uint32_t mask, uint32_t a, uint32_t b) {
  return (mask & a) | (~mask & b);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800

template <typename T>
using ElementPair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ ElementPair<T> as_pair(uint32_t bits) {
  ElementPair<T> pair;
  memcpy(&pair, &bits, sizeof(bits));
  return pair;
}
template <typename T>
__device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
  return __hgt2_mask(as_pair<T>(a), as_pair<T>(b));
}
// Where one is NaN, too.
template <typename T>
__device__ __forceinline__ uint32_t differ(uint32_t a, uint32_t b) {
  return __hneu2_mask(as_pair<T>(a), as_pair<T>(b));
}
template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
  const ElementPair<T> sum = __hadd2(as_pair<T>(a), as_pair<T>(b));
  uint32_t bits;
  memcpy(&bits, &sum, sizeof(bits));
  return bits;
}

#else

template <typename F>
__device__ __forceinline__ uint32_t each_half(uint32_t a, uint32_t b, F&& f) {
  return f(a & 0xffffu, b & 0xffffu) | f(a >> 16, b >> 16) << 16;
}
template <typename T>
__device__ __forceinline__ uint32_t greater(uint32_t a, uint32_t b) {
  return each_half(a, b, [](uint32_t x, uint32_t y) {
    return to_wide(low_of<T>(x)) > to_wide(low_of<T>(y)) ? 0xffffu : 0u;
  });
}
template <typename T>
__device__ __forceinline__ uint32_t differ(uint32_t a, uint32_t b) {
  return each_half(a, b, [](uint32_t x, uint32_t y) {
    return to_wide(low_of<T>(x)) != to_wide(low_of<T>(y)) ? 0xffffu : 0u;
  });
}
template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) {
  const float low = to_wide(low_of<T>(a)) + to_wide(low_of<T>(b));
  const float high = to_wide(high_of<T>(a)) + to_wide(high_of<T>(b));
  return pair_of(from_wide<T>(low), from_wide<T>(high));
}

#endif

}  // namespace torchconv::cuda
