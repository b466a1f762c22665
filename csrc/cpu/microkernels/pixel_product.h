// The register-tile product of a weight gradient, a reduction over pixels:
//
//   sum[m][n] (+)= sum over the pixels p of all runs of rows[m][p] * columns[p][n]
//
// for a few rows and `vectors` vectors of columns. A row is one channel of an image seen through
// one tap, and is read one element at a time with any distance between pixels; columns are channels
// that are neighbours in memory. So at most one operand has to be packed or transposed, none where
// channels are innermost. A run is a piece of an image row on which a tap stays inside the image:
// the product forms no term with padding. In the manner of Dukhan, "The Indirect Convolution
// Algorithm" (arXiv 1907.02129), it reads images through pointers instead of an im2col matrix.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

// The tile and its operands fill the registers: 32 with AVX-512, else 16.
#if defined(__AVX512F__)
inline constexpr int kProductVectors = 4;
#else
inline constexpr int kProductVectors = 2;
#endif
#if defined(__AVX2__)
inline constexpr int kProductRows = 6;
#else
inline constexpr int kProductRows = 5;
#endif

// Rows that are neighbours in memory share a pointer, so that a tile may have more of them, and its
// vectors of columns lie anywhere: those of one pixel seen through several taps. A tile of one
// vector and few rows would wait for its sums.
#if defined(__AVX512F__)
inline constexpr int kNeighbourVectors = 3;
constexpr int neighbour_rows(int vectors) { return vectors == 1 ? 16 : 24 / vectors; }
#else
inline constexpr int kNeighbourVectors = 2;
constexpr int neighbour_rows(int vectors) { return 12 / vectors; }
#endif

// `count` pixels, in elements from the pointers of the tile.
struct ProductRun {
  int64_t row, column, count;
};

template <typename T>
struct PixelProduct {
  const T* rows[kProductRows];       // pixel i of a run is at run.row + i*row_step
  const T* columns;                  // and at run.column + i*column_step
  int64_t apart[kNeighbourVectors];  // of a tile of neighbours: from columns to each vector
  int64_t row_step, column_step;
  const ProductRun* runs;
  int64_t run_count;
  T* sum;
  int64_t sum_stride;
  bool accumulate;           // add to sum, else overwrite it
  bool stream = false;       // past the caches, where sum is overwritten: its rows are streamable
  const void* const* fetch;  // [pixels], fetched into the second-level cache meanwhile
};

template <typename T>
using PixelProductKernel = void (*)(const PixelProduct<T>&);

// 1 <= rows <= kProductRows, 1 <= vectors <= kProductVectors; T is float or double.
template <typename T>
PixelProductKernel<T> pixel_product_kernel(int64_t rows, int64_t vectors);
// Row m is that of rows[0], m elements further. 1 <= vectors <= kNeighbourVectors, 1 <= rows <=
// neighbour_rows(vectors).
template <typename T>
PixelProductKernel<T> pixel_product_neighbours_kernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
