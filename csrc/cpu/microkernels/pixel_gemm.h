// The register tile of a convolution whose vectors run along pixels:
//
//   out[m][n] = g(sums[m][n] + sum over k < depth of a[k][m] * b[k][n] + bias[m] + residual[m][n])
//
// for m < rows filters and n < columns pixels. Both operands are packed in the order of their use,
// a [depth][rows] and b [depth][kPanel], so each is one stream for the hardware prefetcher. The
// last block of a reduction writes where its pixels belong, through the registers that hold them.
#pragma once

#include <cstdint>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

template <typename T>
struct PixelTile {
  const T* a;
  const T* b;
  int64_t depth;
  // Only where the kernel packs.
  const T* source;  // of b: rows source_step apart
  int64_t source_step;
  const T* sums;      // [rows][kPanel], those of the blocks before, or null
  const T* bias;      // [rows], or null
  const T* residual;  // as out lies, or null
  bool clamps;        // g, to [0, most], else the identity
  T most;
  T* out;  // rows out_step apart; may be sums
  int64_t out_step;
  int64_t columns;  // more than vectors - 1 vectors
  // What comes next: one line is fetched with each k, any address will do.
  const void* next;
  int64_t next_step;  // in bytes
};

template <typename T>
using PixelMicrokernel = void (*)(const PixelTile<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors; T is float or double.
template <typename T>
PixelMicrokernel<T> pixel_microkernel(int64_t rows, int64_t vectors);
// The same for a full tile whose b is yet to be packed: it multiplies with the source and leaves b
// behind for the tiles to come, at no cost that the multiplications do not hide.
template <typename T>
PixelMicrokernel<T> packing_pixel_microkernel(int64_t rows);

}  // namespace torchconv::cpu
