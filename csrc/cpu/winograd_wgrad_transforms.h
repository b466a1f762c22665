// One-dimensional transforms for weight gradients: r taps from tiles of s gradients (dz) g and of
// the elements of x, d, that these meet:
//
//   y = A^T ((G g) * (B^T d)),   y[r] = sum over i of g[i] * d[i + r]
//
// (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, section 4.3; the
// matrices by Toom-Cook). The interpolation points are 0, +-5/8, +-3/2 and infinity: their squares
// are exact, and the rounding error is a fraction of that of 0, +-1, +-2 (Barabasz et al., "Error
// analysis and improving the accuracy of Winograd convolution", 2020). The denominators of G are
// applied by the inverse transform, once for all tiles. Two-dimensional transforms apply these to
// columns, then rows.
//
// A scheme has kValues products for an axis, of which several may be summed: kSums are inverted.
// Only the last value needs the tile's last gradient, so a tile without it has one value fewer.
#pragma once

#include <algorithm>

#include "cpu/simd.h"

namespace torchconv::cpu::winograd_gradient {

inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kA2 = kA * kA, kB2 = kB * kB;
// 1 / product of the differences to the other finite points.
inline constexpr float kScale0 = 1 / (kA2 * kB2);
inline constexpr float kScaleA = 1 / (2 * kA2 * (kA2 - kB2));
inline constexpr float kScaleB = 1 / (2 * kB2 * (kB2 - kA2));

using Vector = Vec<float>::Type;

TORCHCONV_INLINE Vector lanes(float x) { return Vec<float>::broadcast(x); }

// B^T d of the finite points, in the order 0, a, -a, b, -b.
TORCHCONV_INLINE void finite_points(Vector d0, Vector d1, Vector d2, Vector d3, Vector d4,
                                    Vector* u) {
  const Vector even_a = d4 - lanes(kB2) * d2, odd_a = d3 - lanes(kB2) * d1;
  const Vector even_b = d4 - lanes(kA2) * d2, odd_b = d3 - lanes(kA2) * d1;
  u[0] = lanes(kA2 * kB2) * d0 - lanes(kA2 + kB2) * d2 + d4;
  u[1] = even_a + lanes(kA) * odd_a;
  u[2] = even_a - lanes(kA) * odd_a;
  u[3] = even_b + lanes(kB) * odd_b;
  u[4] = even_b - lanes(kB) * odd_b;
}

// G g at the finite points without its denominators.
template <int kCount>
TORCHCONV_INLINE void finite_points(const Vector (&g)[kCount], Vector* u) {
  static_assert(kCount >= 2 && kCount <= 4, "powers up to the third");
  Vector even_a = g[0], odd_a = g[1], even_b = g[0], odd_b = g[1];
  if constexpr (kCount > 2) {
    even_a += lanes(kA2) * g[2];
    even_b += lanes(kB2) * g[2];
  }
  if constexpr (kCount > 3) {
    odd_a += lanes(kA2) * g[3];
    odd_b += lanes(kB2) * g[3];
  }
  u[0] = g[0];
  u[1] = even_a + lanes(kA) * odd_a;
  u[2] = even_a - lanes(kA) * odd_a;
  u[3] = even_b + lanes(kB) * odd_b;
  u[4] = even_b - lanes(kB) * odd_b;
}

TORCHCONV_INLINE Vector at_infinity(Vector d1, Vector d3, Vector d5) {
  return lanes(kA2 * kB2) * d1 - lanes(kA2 + kB2) * d3 + d5;
}

// Taps 0, 1, .. without the share of infinity: sums of the points' products times their powers.
template <int kCount>
TORCHCONV_INLINE void inverse_points(const Vector* m, Vector (&y)[kCount]) {
  const Vector even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const Vector even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = lanes(kScale0) * m[0] + lanes(kScaleA) * even_a + lanes(kScaleB) * even_b;
  y[1] = lanes(kA * kScaleA) * odd_a + lanes(kB * kScaleB) * odd_b;
  if constexpr (kCount > 2) y[2] = lanes(kA2 * kScaleA) * even_a + lanes(kB2 * kScaleB) * even_b;
  if constexpr (kCount > 3)
    y[3] = lanes(kA2 * kA * kScaleA) * odd_a + lanes(kB2 * kB * kScaleB) * odd_b;
  if constexpr (kCount > 4)
    y[4] = lanes(kA2 * kA2 * kScaleA) * even_a + lanes(kB2 * kB2 * kScaleB) * even_b;
}

// F(R, 7 - R): neighbouring taps.
template <int R>
struct NeighbourTaps {
  static constexpr int kTaps = R, kInput = 6, kTile = kInput - kTaps + 1, kStride = 1;
  static constexpr int kValues = kInput, kSums = kValues;

  static TORCHCONV_INLINE void source(const Vector (&d)[kInput], Vector (&u)[kValues]) {
    finite_points(d[0], d[1], d[2], d[3], d[4], u);
    u[5] = at_infinity(d[1], d[3], d[5]);
  }
  static TORCHCONV_INLINE void gradient(const Vector (&g)[kTile], Vector (&u)[kValues]) {
    finite_points(g, u);
    u[5] = g[kTile - 1];
  }
  static TORCHCONV_INLINE void inverse(const Vector (&m)[kSums], Vector (&y)[kTaps]) {
    inverse_points(m, y);
    y[kTaps - 1] += m[5];
  }
};
using ThreeTaps = NeighbourTaps<3>;
using FourTaps = NeighbourTaps<4>;
using FiveTaps = NeighbourTaps<5>;

// Stride 2: taps 0 and 2 meet every second element, which is F(2, 4) at the finite points; tap 1
// meets the others, one product for each gradient, and these are summed.
struct ThreeTapsStride2 {
  static constexpr int kTaps = 3, kTile = 4, kStride = 2, kInput = 9, kValues = 9, kSums = 6;

  static TORCHCONV_INLINE void source(const Vector (&d)[kInput], Vector (&u)[kValues]) {
    finite_points(d[0], d[2], d[4], d[6], d[8], u);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) u[5 + i] = d[2 * i + 1];
  }
  static TORCHCONV_INLINE void gradient(const Vector (&g)[kTile], Vector (&u)[kValues]) {
    finite_points(g, u);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) u[5 + i] = g[i];
  }
  static TORCHCONV_INLINE void inverse(const Vector (&m)[kSums], Vector (&y)[kTaps]) {
    Vector even[2];
    inverse_points(m, even);
    y[0] = even[0];
    y[1] = m[5];
    y[2] = even[1];
  }
};

}  // namespace torchconv::cpu::winograd_gradient
