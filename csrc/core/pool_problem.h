// One 2D pooling, described once by csrc/ops and read by every kernel.
//
// The window of output (p, q) is x[p*stride_h - pad_h + r*dilation_h, q*stride_w - pad_w +
// s*dilation_w] for 0 <= r < R, 0 <= s < S; elements outside the image do not take part (max, min)
// or count as zero (average). Average pooling has dilation 1. P and Q already include ceil_mode.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace torchconv {

struct PoolProblem {
  int64_t N, C, H, W;  // x
  int64_t R, S;        // window
  int64_t P, Q;        // y: N x C x P x Q
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  DType dtype;
  Layout layout;           // of x, y, offsets, indices and gradients
  bool count_include_pad;  // average: the divisor counts padding (but not what ceil_mode adds)
  int64_t divisor;         // average: divisor_override, 0 for none
};

enum class Select : uint8_t { kMax, kMin };

// What names the selected elements: an in-window offset of one of three widths, or an int64 index.
enum class Selected : uint8_t { kOffset8, kOffset16, kOffset32, kIndex64 };

// What max and min pooling remember for backward: the position r*S + s of the selected element in
// its window, in the narrowest unsigned type that also leaves room for "no valid element".
constexpr DType offset_dtype(int64_t R, int64_t S) {
  return R * S <= 255 ? DType::kUInt8 : R * S <= 65535 ? DType::kUInt16 : DType::kInt32;
}

// The selected element is named by its offset in the window or by its index h*W + w in the plane;
// a window with no valid element holds kNoOffset<T> (all bits set) in either form.
template <typename T>
inline constexpr T kNoOffset = static_cast<T>(-1);

}  // namespace torchconv
