// The register tile of a convolution whose vectors run along filters and whose pixels are
// neighbours in a band (conv_band.h):
//
//   sums[m][n] (+)= sum over k < depth of band[offsets[k] + m] * w[k][n]
//
// for m < rows pixels of one image row and n < vectors of filters. Every broadcast has a constant
// offset from its term's, so no pixel is copied into a panel (Dukhan, "The Indirect Convolution
// Algorithm", arXiv 1907.02129, with an offset for each term instead of a pointer for each pixel).
#pragma once

#include <cstdint>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

template <typename T>
struct BandTile {
  const T* band;           // at the tile's first pixel
  const int64_t* offsets;  // [depth]
  const T* w;              // [depth][vectors*lanes]
  T* sums;                 // [rows][kPanel]
  int64_t depth;
  bool accumulate;   // add to sums, else overwrite them
  const void* next;  // one line is fetched with each k, any address will do
};

template <typename T>
using BandMicrokernel = void (*)(const BandTile<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors; T is float or double.
template <typename T>
BandMicrokernel<T> band_microkernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
