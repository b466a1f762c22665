// The register tile of convolutions with few filters on channels_last images: every sum is an inner
// product whose terms lie along the lanes,
//
//   out[m*out_pixel + f] += sum over runs r and i < r.length of
//                           src[m*step + r.src + i] * w[f*filter_step + r.w + i]
//
// for m < pixels and f < filters. A run is what a filter reads of one row of the image: its
// channels, and those of the neighbouring taps. The lanes are summed when all runs are through,
// those of many sums at once by merging halves of vectors.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

struct TermRun {
  int64_t src, w, length;
};

template <typename T>
struct InnerTile {
  const T* src;
  int64_t step;
  const TermRun* runs;
  int64_t run_count;
  const T* w;
  int64_t filter_step;
  int64_t ahead;  // from a weight to the one that is asked for with it, or 0; of few pixels alone
  T* out;
  int64_t out_pixel;
};

template <typename T>
using InnerMicrokernel = void (*)(const InnerTile<T>&);

// Most filters of a tile.
inline constexpr int64_t kInnerFilters = 4;

// Most pixels of a tile: its sums, with what is loaded for a step, fill the registers.
inline constexpr int64_t kInnerPixels = kVectorBytes == 64 ? 8 : 4;

// Pixels of the next tile where so many are left: tiles are powers of two.
constexpr int64_t inner_tile_pixels(int64_t left, int64_t filters) {
  int64_t pixels = filters == kInnerFilters ? kInnerPixels / 2 : kInnerPixels;
  while (pixels > left) pixels /= 2;
  return pixels;
}

// pixels: from inner_tile_pixels for these filters, or for more. T is float or double.
template <typename T>
InnerMicrokernel<T> inner_microkernel(int64_t pixels, int64_t filters);

}  // namespace torchconv::cpu
