// One-dimensional transforms of F(3, 4), three weight gradients from tiles of four dz and six x:
//
//   y = A^T ((G g) * (B^T d)),   y[r] = sum over i < 4 of g[i] * d[i + r]
//
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016; the matrices by
// Toom-Cook). The interpolation points are 0, +-5/8, +-3/2 and infinity: their squares are exact,
// and the rounding error is a fraction of that of 0, +-1, +-2 (Barabasz et al., "Error analysis and
// improving the accuracy of Winograd convolution", 2020). The denominators of G are applied by the
// inverse transform, once for all tiles. Two-dimensional transforms apply these to columns, then
// rows.
#pragma once

#include "cpu/simd.h"

namespace torchconv::cpu::winograd_wgrad_transforms {

inline constexpr int kTaps = 3;
inline constexpr int kStep = 4;   // dz in a tile, and the distance of tiles
inline constexpr int kInput = 6;  // x in a tile
inline constexpr int kPoints = 6;

inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kA2 = kA * kA, kB2 = kB * kB;
// 1 / product of the differences to the other finite points.
inline constexpr float kScale0 = 1 / (kA2 * kB2);
inline constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2));
inline constexpr float kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

using Vector = Vec<float>::Type;

TORCHCONV_INLINE Vector lanes(float x) { return Vec<float>::broadcast(x); }

// B^T d; the points in the order 0, a, -a, b, -b, infinity.
TORCHCONV_INLINE void transform(const Vector (&d)[kInput], Vector (&u)[kPoints]) {
  u[0] = lanes(kA2 * kB2) * d[0] - lanes(kA2 + kB2) * d[2] + d[4];
  u[5] = lanes(kA2 * kB2) * d[1] - lanes(kA2 + kB2) * d[3] + d[5];
  const Vector even_a = d[4] - lanes(kB2) * d[2], odd_a = d[3] - lanes(kB2) * d[1];
  const Vector even_b = d[4] - lanes(kA2) * d[2], odd_b = d[3] - lanes(kA2) * d[1];
  u[1] = even_a + lanes(kA) * odd_a;
  u[2] = even_a - lanes(kA) * odd_a;
  u[3] = even_b + lanes(kB) * odd_b;
  u[4] = even_b - lanes(kB) * odd_b;
}

// G g without its denominators.
TORCHCONV_INLINE void transform(const Vector (&g)[kStep], Vector (&u)[kPoints]) {
  const Vector even_a = g[0] + lanes(kA2) * g[2], odd_a = g[1] + lanes(kA2) * g[3];
  const Vector even_b = g[0] + lanes(kB2) * g[2], odd_b = g[1] + lanes(kB2) * g[3];
  u[0] = g[0];
  u[1] = even_a + lanes(kA) * odd_a;
  u[2] = even_a - lanes(kA) * odd_a;
  u[3] = even_b + lanes(kB) * odd_b;
  u[4] = even_b - lanes(kB) * odd_b;
  u[5] = g[3];
}

// A^T m with G's denominators.
TORCHCONV_INLINE void inverse_transform(const Vector (&m)[kPoints], Vector (&y)[kTaps]) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = lanes(kScale0) * m[0] + lanes(kScaleA) * even_a + lanes(kScaleB) * even_b;
  y[1] = lanes(kA * kScaleA) * odd_a + lanes(kB * kScaleB) * odd_b;
  y[2] = lanes(kA2 * kScaleA) * even_a + lanes(kB2 * kScaleB) * even_b + m[5];
}

}  // namespace torchconv::cpu::winograd_wgrad_transforms
