// The one-dimensional transforms of Winograd's F(4,3), F(3,4) and F(2,5), lane by lane on vectors:
//
//   y = A^T ((G g) * (B^T d)),   d 6 inputs, g the taps, y the outputs, * element by element
//
// A two-dimensional tile applies each to the columns and then to the rows (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2015). The interpolation points are 0, +-5/8,
// +-3/2 and infinity instead of 0, +-1, +-2: three times the accuracy (the choice of points is
// Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution", 2018), and
// the squares of these two are exact.
//
// Row p of B^T holds the coefficients of the product of (x - q) over the finite points q other than
// p, and for infinity over all of them; row p of G is (1, p, p^2, ..) over the same product at
// x = p; column p of A^T is the powers of p. So B^T is the same for any number of taps. Infinity
// touches d[5] and the last output only, so without it the other five points compute one output
// less with the same G: the smaller tile that fits, of three taps, 7 or 14 outputs exactly.
#pragma once

#include "cpu/simd.h"

namespace torchconv::cpu::winograd {

inline constexpr int kPoints = 6;  // the last is infinity
inline constexpr int kProducts = kPoints * kPoints;
constexpr int tile_outputs(int taps) { return kPoints - taps + 1; }

// The points are 0, +-kA, +-kB. Their powers and those of their squares are exact in float, so that
// double needs no others.
inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kAA = kA * kA, kBB = kB * kB;

// v = B^T d. Without infinity d[5] is not read and v[5] not written.
template <bool kInfinity, typename V>
TORCHCONV_INLINE void transform_input(const V (&d)[kPoints], V (&v)[kPoints]) {
  v[0] = d[0] * (kAA * kBB) + (d[4] - d[2] * (kAA + kBB));
  const V even_a = d[4] - d[2] * kBB, odd_a = (d[3] - d[1] * kBB) * kA;
  const V even_b = d[4] - d[2] * kAA, odd_b = (d[3] - d[1] * kAA) * kB;
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  if constexpr (kInfinity) v[5] = d[1] * (kAA * kBB) + (d[5] - d[3] * (kAA + kBB));
}

// u = G g.
template <int kTaps, typename V>
TORCHCONV_INLINE void transform_weight(const V (&g)[kTaps], V (&u)[kPoints]) {
  static_assert(kTaps >= 3 && kTaps <= 5, "powers up to the fourth");
  using Lane = std::decay_t<decltype(g[0][0])>;
  constexpr Lane kAtZero = 1 / Lane{kAA * kBB};
  constexpr Lane kAtA = 1 / Lane{2 * kAA * (kAA - kBB)}, kAtB = 1 / Lane{2 * kBB * (kBB - kAA)};
  V even_a = g[0] * kAtA + g[2] * (kAA * kAtA), odd_a = g[1] * (kA * kAtA);
  V even_b = g[0] * kAtB + g[2] * (kBB * kAtB), odd_b = g[1] * (kB * kAtB);
  if constexpr (kTaps > 3) {
    odd_a += g[3] * (kA * kAA * kAtA);
    odd_b += g[3] * (kB * kBB * kAtB);
  }
  if constexpr (kTaps > 4) {
    even_a += g[4] * (kAA * kAA * kAtA);
    even_b += g[4] * (kBB * kBB * kAtB);
  }
  u[0] = g[0] * kAtZero;
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[kTaps - 1];
}

// y = A^T m. Without infinity m[5] is not read and the last output not written.
template <bool kInfinity, int kOutputs, typename V>
TORCHCONV_INLINE void transform_output(const V (&m)[kPoints], V (&y)[kOutputs]) {
  static_assert(kOutputs >= 2 && kOutputs <= 4, "powers up to the third");
  constexpr int kCount = kOutputs - (kInfinity ? 0 : 1);
  const V sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const V sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  if constexpr (kCount > 1) y[1] = difference_a * kA + difference_b * kB;
  if constexpr (kCount > 2) y[2] = sum_a * kAA + sum_b * kBB;
  if constexpr (kCount > 3) y[3] = difference_a * (kA * kAA) + difference_b * (kB * kBB);
  if constexpr (kInfinity) y[kCount - 1] += m[kPoints - 1];
}

}  // namespace torchconv::cpu::winograd
