// Four channels of a pixel, as the grouped kernels with channels contiguous load and store them:
// one vector, or single elements where a group is no multiple of four or pointers are not aligned.
#pragma once

#include "cuda/element.h"

namespace torchconv::cuda {

inline constexpr int kQuad = 4;

// `present` of the four are the group's; the others are zero.
template <bool kAligned, typename T>
__device__ __forceinline__ Vector<T, kQuad> load_quad(const T* source, int present, bool inside) {
  Vector<T, kQuad> quad{};
  if constexpr (kAligned) {
    if (inside) quad = *reinterpret_cast<const Vector<T, kQuad>*>(source);
  } else {
#pragma unroll
    for (int c = 0; c < kQuad; ++c)
      if (inside && c < present) quad.element[c] = source[c];
  }
  return quad;
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_quad(T* target, const Wide<T>* values, int present) {
  if constexpr (kAligned) {
    Vector<T, kQuad> quad;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) quad.element[k] = from_wide<T>(values[k]);
    *reinterpret_cast<Vector<T, kQuad>*>(target) = quad;
  } else {
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
      if (k < present) target[k] = from_wide<T>(values[k]);
  }
}

}  // namespace torchconv::cuda
