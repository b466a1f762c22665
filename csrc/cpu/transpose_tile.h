// A register-sized transposition with ragged edges: no element outside them is read or written.
#pragma once

#include <cstdint>

#include "cpu/conv_pack.h"

namespace torchconv::cpu {

// dst[c*dst_stride + r] = src[r*src_stride + c] for r < rows and c < columns, both at most a
// vector, converted; whole vectors are written, with zeros in the lanes from `rows` on, for c <
// written.
template <typename T>
TORCHCONV_INLINE void transpose_tile(const T* src, int64_t src_stride, int64_t rows,
                                     int64_t columns, Wide<T>* dst, int64_t dst_stride,
                                     int64_t written) {
  using V = WideVec<T>;
  constexpr int kL = V::kLanes;
  typename V::Type tile[kL];
  if (rows == kL && columns == kL) {
#pragma GCC unroll 16
    for (int r = 0; r < kL; ++r) tile[r] = V::load(src + r * src_stride);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kL; ++r)
      tile[r] = r < rows ? V::load_partial(src + r * src_stride, columns) : typename V::Type{};
  }
  transpose_steps<1>(tile);
  if (written == kL) {
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) V::Registers::store(dst + c * dst_stride, tile[c]);
    return;
  }
#pragma GCC unroll 16
  for (int c = 0; c < kL; ++c)
    if (c < written) V::Registers::store(dst + c * dst_stride, tile[c]);
}

}  // namespace torchconv::cpu
