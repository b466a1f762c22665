// The one-dimensional transforms of Winograd's F(4,3), and of F(3,4) for weight gradients:
//
//   y = A^T ((G g) * (B^T d)),   d 6 inputs, g the taps, y the outputs, * element by element
//
// A two-dimensional tile applies each to the columns and then to the rows (Lavin and Gray, Fast
// Algorithms for Convolutional Neural Networks, 2016). The matrices are those of
// csrc/cpu/winograd_transforms.h and csrc/cpu/winograd_wgrad_transforms.h, which say where they
// come from: points 0, +-5/8, +-3/2 and infinity, of a third of the error of 0, +-1, +-2. In float.
#pragma once

#include "cuda/launch.h"

namespace torchconv::cuda::winograd {

inline constexpr int kPoints = 6;  // the last is infinity
inline constexpr int kProducts = kPoints * kPoints;
inline constexpr int kOutputs = 4, kTaps = 3;

inline constexpr float kA = 0.625f, kB = 1.5f;
inline constexpr float kAA = kA * kA, kBB = kB * kB;
// 1 / product of the differences to the other finite points.
inline constexpr float kAtZero = 1 / (kAA * kBB);
inline constexpr float kAtA = 1 / (2 * kAA * (kAA - kBB)), kAtB = 1 / (2 * kBB * (kBB - kAA));

// v = B^T d, of both.
__device__ __forceinline__ void transform_source(const float (&d)[kPoints], float (&v)[kPoints]) {
  const float even_a = d[4] - kBB * d[2], odd_a = d[3] - kBB * d[1];
  const float even_b = d[4] - kAA * d[2], odd_b = d[3] - kAA * d[1];
  v[0] = (kAA * kBB) * d[0] + (d[4] - (kAA + kBB) * d[2]);
  v[1] = even_a + kA * odd_a;
  v[2] = even_a - kA * odd_a;
  v[3] = even_b + kB * odd_b;
  v[4] = even_b - kB * odd_b;
  v[5] = (kAA * kBB) * d[1] + (d[5] - (kAA + kBB) * d[3]);
}

// u = G g.
__device__ __forceinline__ void transform_weight(const float (&g)[kTaps], float (&u)[kPoints]) {
  const float even_a = kAtA * g[0] + (kAA * kAtA) * g[2], odd_a = (kA * kAtA) * g[1];
  const float even_b = kAtB * g[0] + (kBB * kAtB) * g[2], odd_b = (kB * kAtB) * g[1];
  u[0] = kAtZero * g[0];
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = g[2];
}

// y = A^T m.
__device__ __forceinline__ void transform_products(const float (&m)[kPoints],
                                                   float (&y)[kOutputs]) {
  const float sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const float sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  y[0] = m[0] + sum_a + sum_b;
  y[1] = kA * difference_a + kB * difference_b;
  y[2] = kAA * sum_a + kBB * sum_b;
  y[3] = (kA * kAA) * difference_a + (kB * kBB) * difference_b + m[5];
}

// u = G g of four gradients, without its denominators, which the inverse transform applies once for
// all tiles.
__device__ __forceinline__ void transform_gradient(const float (&g)[kOutputs],
                                                   float (&u)[kPoints]) {
  const float even_a = g[0] + kAA * g[2], odd_a = g[1] + kAA * g[3];
  const float even_b = g[0] + kBB * g[2], odd_b = g[1] + kBB * g[3];
  u[0] = g[0];
  u[1] = even_a + kA * odd_a;
  u[2] = even_a - kA * odd_a;
  u[3] = even_b + kB * odd_b;
  u[4] = even_b - kB * odd_b;
  u[5] = g[3];
}

// The three taps of a weight's gradient.
__device__ __forceinline__ void transform_weight_products(const float (&m)[kPoints],
                                                          float (&y)[kTaps]) {
  const float even_a = m[1] + m[2], odd_a = m[1] - m[2];
  const float even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = kAtZero * m[0] + kAtA * even_a + kAtB * even_b;
  y[1] = (kA * kAtA) * odd_a + (kB * kAtB) * odd_b;
  y[2] = (kAA * kAtA) * even_a + (kBB * kAtB) * even_b + m[5];
}

}  // namespace torchconv::cuda::winograd
