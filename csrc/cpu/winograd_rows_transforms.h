// The one-dimensional transforms of Winograd's F(4,1), F(4,2) and F(4,3), lane by lane on vectors:
// four neighbouring outputs of one, two or three taps. All have the points of
// winograd_transforms.h, in the order kA, -kA, kB, -kB, 0 and infinity, of which F(4,n) uses the
// first n + 3. So the products of taps in different numbers have the same sums and one transform of
// the outputs. A single tap saves nothing, but its four products are of one value, and need no sums
// of their own.
#pragma once

#include "cpu/winograd_strided_transforms.h"

namespace torchconv::cpu::winograd::rows {

inline constexpr int kOutputs = 4, kMostTaps = 3, kMostPoints = 6;
constexpr int points_of(int taps) { return taps + kOutputs - 1; }
// Vectors of a term's weights.
constexpr int weights_of(int taps) { return taps == 1 ? 1 : points_of(taps); }

// d and v: points_of(kTaps).
template <int kTaps, typename V>
TORCHCONV_INLINE void transform_input(const V* d, V* v) {
  if constexpr (kTaps == 3) {
    const V inputs[6] = {d[0], d[1], d[2], d[3], d[4], d[5]};
    V points[6];
    winograd::transform_input<true>(inputs, points);
    for (int p = 0; p < 4; ++p) v[p] = points[p + 1];
    v[4] = points[0];
    v[5] = points[5];
  } else if constexpr (kTaps == 2) {
    winograd_strided::pair::transform_input<true>(d, v);
  } else {
    // The inverse of transform_output.
    constexpr float kHalf = 1 / (2 * (kAA - kBB));
    const V even_a = (d[2] - d[0] * kBB) * kHalf, odd_a = (d[3] - d[1] * kBB) * (kHalf / kA);
    const V even_b = (d[0] * kAA - d[2]) * kHalf, odd_b = (d[1] * kAA - d[3]) * (kHalf / kB);
    v[0] = even_a + odd_a;
    v[1] = even_a - odd_a;
    v[2] = even_b + odd_b;
    v[3] = even_b - odd_b;
  }
}

// g[kTaps] to u[weights_of(kTaps)].
template <int kTaps, typename V>
TORCHCONV_INLINE void transform_weight(const V* g, V* u) {
  if constexpr (kTaps == 3) {
    const V taps[3] = {g[0], g[1], g[2]};
    V points[6];
    winograd::transform_weight(taps, points);
    for (int p = 0; p < 4; ++p) u[p] = points[p + 1];
    u[4] = points[0];
    u[5] = points[5];
  } else if constexpr (kTaps == 2) {
    winograd_strided::pair::transform_weight(g, u);
  } else {
    u[0] = g[0];
  }
}

template <typename V>
TORCHCONV_INLINE void transform_output(const V (&m)[kMostPoints], V (&y)[kOutputs]) {
  winograd_strided::pair::transform_output<true>(m, y);
  y[kOutputs - 1] += m[kMostPoints - 1];
}

}  // namespace torchconv::cpu::winograd::rows
