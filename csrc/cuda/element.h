// Element types on the GPU: what they are computed in, how they round, and vectors of them.
#pragma once

#include <type_traits>

#include "core/types.h"
#include "cuda/launch.h"

namespace torchconv::cuda {

using Half = __half;
using BFloat16 = __nv_bfloat16;

// What an element is computed in: itself, but float for the half types.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>, float, T>;

template <typename T>
__host__ __device__ __forceinline__ Wide<T> to_wide(T v) {
  if constexpr (std::is_same_v<T, Half>)
    return __half2float(v);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __bfloat162float(v);
  else
    return v;
}

// Rounded to nearest, ties to even.
template <typename T>
__host__ __device__ __forceinline__ T from_wide(Wide<T> v) {
  if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(v);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(v);
  else
    return v;
}

// Count elements that are loaded and stored at once: 16 bytes at most, and aligned to them.
template <typename T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  static constexpr int kCount = Count;
  T element[Count];
};

// As many elements as 16 bytes hold.
template <typename T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// Whether vectors of `count` elements of T can be loaded from p.
template <typename T>
bool aligned(const void* p, int count) {
  return reinterpret_cast<uintptr_t>(p) % (sizeof(T) * static_cast<size_t>(count)) == 0;
}

// f(T{}) with T the type of dtype, one of the four floating-point ones.
template <typename F>
void with_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Half{});
    default:
      return f(float{});
  }
}

// As with_float, for integers too.
template <typename F>
void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kUInt8:
      return f(uint8_t{});
    case DType::kInt8:
      return f(int8_t{});
    case DType::kInt16:
      return f(int16_t{});
    case DType::kUInt16:
      return f(uint16_t{});
    case DType::kInt32:
      return f(int32_t{});
    case DType::kInt64:
      return f(int64_t{});
    default:
      return with_float(dtype, f);
  }
}

}  // namespace torchconv::cuda
