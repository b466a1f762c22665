// The products of one column of points in Winograd's domain, and the inverse transform down that
// column while they are in registers:
//
//   y[t][i][n] = sum over r of A^T[i][r] * (sum over c of v[r][t][c] * u[r][c][n])
//
// for t < tiles, i the rows of outputs, n the lanes of a vector of filters. What goes to memory is
// two thirds of the products, and of 3x3 kernels with AVX-512 only: the products of a tile's
// column, of six points or five, fill the registers for four tiles there.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

inline constexpr bool kWinogradColumns = kVectorBytes == 64;
inline constexpr int kColumnTiles = 4;

struct WinogradColumn {
  const float* v;  // as in winograd_gemm.h, of the first point
  const float* u;
  float* y;
  const float* next;         // as many lines as there are channels, a panel apart, or any address
  int64_t v_point, u_point;  // from a point of the column to the next
  int64_t v_step;            // from one vector of channels to the next
  int64_t y_step, y_row;     // from one tile to the next, from one row of outputs to the next
  int64_t channels;          // a multiple of kWinogradStep
};

using WinogradColumnKernel = void (*)(const WinogradColumn&);

// 1 <= tiles <= kColumnTiles. tall: six points and four rows of outputs, else five and three.
WinogradColumnKernel winograd_column_kernel(int64_t tiles, bool tall);

}  // namespace torchconv::cpu
