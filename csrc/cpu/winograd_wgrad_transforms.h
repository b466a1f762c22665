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

// Exact in float, so that double needs no others.
inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kA2 = kA * kA, kB2 = kB * kB;
// 1 / product of the differences to the other finite points.
template <typename A>
inline constexpr A kScale0 = 1 / A{kA2 * kB2};
template <typename A>
inline constexpr A kScaleA = 1 / A{2 * kA2 * (kA2 - kB2)};
template <typename A>
inline constexpr A kScaleB = 1 / A{2 * kB2 * (kB2 - kA2)};

// A is the type that all of it is computed in: float or double.
template <typename A>
using Vector = typename Vec<A>::Type;

// B^T d of the finite points, in the order 0, a, -a, b, -b.
template <typename V>
TORCHCONV_INLINE void finite_points(V d0, V d1, V d2, V d3, V d4, V* u) {
  const V even_a = d4 - kB2 * d2, odd_a = d3 - kB2 * d1;
  const V even_b = d4 - kA2 * d2, odd_b = d3 - kA2 * d1;
  u[0] = (kA2 * kB2) * d0 - (kA2 + kB2) * d2 + d4;
  u[1] = even_a + kA * odd_a;
  u[2] = even_a - kA * odd_a;
  u[3] = even_b + kB * odd_b;
  u[4] = even_b - kB * odd_b;
}

// G g at the finite points without its denominators.
template <int kCount, typename V>
TORCHCONV_INLINE void finite_points(const V (&g)[kCount], V* u) {
  static_assert(kCount >= 2 && kCount <= 4, "powers up to the third");
  V even_a = g[0], odd_a = g[1], even_b = g[0], odd_b = g[1];
  if constexpr (kCount > 2) {
    even_a += kA2 * g[2];
    even_b += kB2 * g[2];
  }
  if constexpr (kCount > 3) {
    odd_a += kA2 * g[3];
    odd_b += kB2 * g[3];
  }
  u[0] = g[0];
  u[1] = even_a + kA * odd_a;
  u[2] = even_a - kA * odd_a;
  u[3] = even_b + kB * odd_b;
  u[4] = even_b - kB * odd_b;
}

template <typename V>
TORCHCONV_INLINE V at_infinity(V d1, V d3, V d5) {
  return (kA2 * kB2) * d1 - (kA2 + kB2) * d3 + d5;
}

// Taps 0, 1, .. without the share of infinity: sums of the points' products times their powers.
template <int kCount, typename V>
TORCHCONV_INLINE void inverse_points(const V* m, V (&y)[kCount]) {
  using A = std::decay_t<decltype(m[0][0])>;
  constexpr A kAt0 = kScale0<A>, kAtA = kScaleA<A>, kAtB = kScaleB<A>;
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const V even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = kAt0 * m[0] + kAtA * even_a + kAtB * even_b;
  y[1] = (kA * kAtA) * odd_a + (kB * kAtB) * odd_b;
  if constexpr (kCount > 2) y[2] = (kA2 * kAtA) * even_a + (kB2 * kAtB) * even_b;
  if constexpr (kCount > 3) y[3] = (kA2 * kA * kAtA) * odd_a + (kB2 * kB * kAtB) * odd_b;
  if constexpr (kCount > 4) y[4] = (kA2 * kA2 * kAtA) * even_a + (kB2 * kB2 * kAtB) * even_b;
}

// F(R, 7 - R): neighbouring taps.
template <int R>
struct NeighbourTaps {
  static constexpr int kTaps = R, kInput = 6, kTile = kInput - kTaps + 1, kStride = 1;
  static constexpr int kValues = kInput, kSums = kValues;

  template <typename V>
  static TORCHCONV_INLINE void source(const V (&d)[kInput], V (&u)[kValues]) {
    finite_points(d[0], d[1], d[2], d[3], d[4], u);
    u[5] = at_infinity(d[1], d[3], d[5]);
  }
  template <typename V>
  static TORCHCONV_INLINE void gradient(const V (&g)[kTile], V (&u)[kValues]) {
    finite_points(g, u);
    u[5] = g[kTile - 1];
  }
  template <typename V>
  static TORCHCONV_INLINE void inverse(const V (&m)[kSums], V (&y)[kTaps]) {
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

  template <typename V>
  static TORCHCONV_INLINE void source(const V (&d)[kInput], V (&u)[kValues]) {
    finite_points(d[0], d[2], d[4], d[6], d[8], u);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) u[5 + i] = d[2 * i + 1];
  }
  template <typename V>
  static TORCHCONV_INLINE void gradient(const V (&g)[kTile], V (&u)[kValues]) {
    finite_points(g, u);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) u[5 + i] = g[i];
  }
  template <typename V>
  static TORCHCONV_INLINE void inverse(const V (&m)[kSums], V (&y)[kTaps]) {
    V even[2];
    inverse_points(m, even);
    y[0] = even[0];
    y[1] = m[5];
    y[2] = even[1];
  }
};

}  // namespace torchconv::cpu::winograd_gradient
