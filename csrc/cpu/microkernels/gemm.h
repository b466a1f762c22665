// The register-tile product of a band (conv_band_gather.h):
//
//   c[m][n] (+)= sum over k < depth of a[m*kARow + k] * b[offsets[k] + n],
//   m < rows, n < vectors*lanes
//
// a is a packed block of rows with a compile-time row stride, so that every broadcast has a
// constant address offset and a tile may start at any row; row k of b starts at b + offsets[k]
// (Dukhan, "The Indirect Convolution Algorithm", arXiv 1907.02129), which needs no packing. c is
// scratch in the computing type: bias, activation, rounding and ragged edges belong to the
// epilogue. The design is Goto and van de Geijn's ("Anatomy of High-Performance Matrix
// Multiplication", 2008) with the broadcast operand in memory.
#pragma once

#include <cstdint>

#include "core/range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Products are accumulated in registers over at most kDepth terms and these sums then added in
// memory: the rounding error grows with kDepth + terms/kDepth instead of the number of terms. A
// panel of kDepth rows of two vectors also stays in a 32 to 48 KB first-level cache.
inline constexpr int64_t kDepth = 192;

// One odd number of 64-byte lines: the rows of a tile fall into different cache sets.
template <typename T>
inline constexpr int64_t kARow = kDepth + 64 / static_cast<int64_t>(sizeof(T));

// The tile fills the registers: 32 with AVX-512, else 16.
#if defined(__AVX512F__)
inline constexpr int kMaxRows = 14;
#elif defined(__AVX2__)
inline constexpr int kMaxRows = 6;
#else
inline constexpr int kMaxRows = 5;
#endif
inline constexpr int kMaxVectors = 2;

template <typename T>
inline constexpr int64_t kLanes = Vec<T>::kLanes;
// Columns of a full tile.
template <typename T>
inline constexpr int64_t kPanel = kMaxVectors * kLanes<T>;

template <typename T>
struct GemmTile {
  const T* a;
  const T* b;
  T* c;
  int64_t depth, ldc;
  bool accumulate;         // add to c, else overwrite it
  const int64_t* offsets;  // [depth]
};

// Calls f(first, rows) on even tiles of at most `most` rows.
template <typename F>
TORCHCONV_INLINE void for_row_tiles(int64_t rows, int64_t most, F&& f) {
  const int64_t tiles = ceil_div(rows, most);
  int64_t first = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t n = rows / tiles + (t < rows % tiles ? 1 : 0);
    f(first, n);
    first += n;
  }
}
template <typename F>
TORCHCONV_INLINE void for_row_tiles(int64_t rows, F&& f) {
  for_row_tiles(rows, kMaxRows, f);
}

template <typename T>
using GemmMicrokernel = void (*)(const GemmTile<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors; T is float or double.
template <typename T>
GemmMicrokernel<T> gemm_microkernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
