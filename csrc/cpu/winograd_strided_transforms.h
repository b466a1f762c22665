// The one-dimensional transforms of strided Winograd, lane by lane on vectors.
//
// F(4,2), and for a short tile F(3,2), is what the two outer taps of a kernel of three make of
// every other pixel: y[i] = g[0] d[i] + g[1] d[i + 1]. The points are those of F(4,3) in
// winograd_transforms.h without infinity, in the order kA, -kA, kB, -kB, 0. A short tile leaves 0
// out; the factors that this changes go into its source, so that both sizes share their weights.
//
// F(3,4), and for a short tile F(2,4), is what four taps make of a phase of the source: as it is in
// winograd_transforms.h.
#pragma once

#include "cpu/winograd_transforms.h"

namespace torchconv::cpu::winograd_strided {

using winograd::kA;
using winograd::kAA;
using winograd::kB;
using winograd::kBB;

inline constexpr float kAtZero = 1 / (kAA * kBB);
inline constexpr float kAtA = 1 / (2 * kAA * (kAA - kBB)), kAtB = 1 / (2 * kBB * (kBB - kAA));

// Of two taps.
namespace pair {

inline constexpr int kPoints = 5, kOutputs = 4;

// d[kPoints] to v[kPoints]; one less of each in a short tile.
template <bool kTall, typename V>
TORCHCONV_INLINE void transform_input(const V* d, V* v) {
  if constexpr (kTall) {
    const V even_a = d[4] - d[2] * kBB, odd_a = (d[3] - d[1] * kBB) * kA;
    const V even_b = d[4] - d[2] * kAA, odd_b = (d[3] - d[1] * kAA) * kB;
    v[0] = even_a + odd_a;
    v[1] = even_a - odd_a;
    v[2] = even_b + odd_b;
    v[3] = even_b - odd_b;
    v[4] = d[0] * (kAA * kBB) + (d[4] - d[2] * (kAA + kBB));
  } else {
    const V even_a = (d[2] - d[0] * kBB) * kAA, odd_a = (d[3] - d[1] * kBB) * kA;
    const V even_b = (d[2] - d[0] * kAA) * kBB, odd_b = (d[3] - d[1] * kAA) * kB;
    v[0] = even_a + odd_a;
    v[1] = even_a - odd_a;
    v[2] = even_b + odd_b;
    v[3] = even_b - odd_b;
  }
}

// g[2] to u[kPoints].
template <typename V>
TORCHCONV_INLINE void transform_weight(const V* g, V* u) {
  const V even_a = g[0] * kAtA, odd_a = g[1] * (kA * kAtA);
  const V even_b = g[0] * kAtB, odd_b = g[1] * (kB * kAtB);
  u[0] = even_a + odd_a;
  u[1] = even_a - odd_a;
  u[2] = even_b + odd_b;
  u[3] = even_b - odd_b;
  u[4] = g[0] * kAtZero;
}

// m[kPoints] to y[kOutputs]; one less of each in a short tile.
template <bool kTall, typename V>
TORCHCONV_INLINE void transform_output(const V* m, V* y) {
  const V sum_a = m[0] + m[1], difference_a = m[0] - m[1];
  const V sum_b = m[2] + m[3], difference_b = m[2] - m[3];
  y[0] = sum_a + sum_b;
  y[1] = difference_a * kA + difference_b * kB;
  y[2] = sum_a * kAA + sum_b * kBB;
  if constexpr (kTall) {
    y[0] += m[4];
    y[3] = difference_a * (kA * kAA) + difference_b * (kB * kBB);
  }
}

}  // namespace pair

// Of four taps.
namespace quad {

inline constexpr int kPoints = winograd::kPoints, kTaps = 4;
inline constexpr int kOutputs = winograd::tile_outputs(kTaps);

}  // namespace quad

}  // namespace torchconv::cpu::winograd_strided
