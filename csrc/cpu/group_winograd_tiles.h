// How grouped images are cut for Winograd's algorithm along the rows. With vectors along channels
// (group_band.h) a tile is four columns, or three where that fits better (winograd_tiles.h), of
// some rows: its source is transformed to
//
//   [vector of channels][point][row][lanes]
//
// and each point is a convolution of a column with three taps one below the other, which the
// register tiles of microkernels/group_tile.h compute as they do a row of pixels.
#pragma once

#include <algorithm>

#include "cpu/group_band.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::group_winograd {

inline constexpr int kTaps = 3, kPoints = winograd::kPoints, kOutputs = kPoints - kTaps + 1;
// Rows of outputs that are computed together, and what they read.
inline constexpr int kRows = kSumTiles[0], kSourceRows = kRows + kTaps - 1;
inline constexpr int64_t kPlane = kSourceRows * kLanes<float>;  // of a point
inline constexpr int64_t kTile = kPoints * kPlane;              // of a vector

// The view with columns for whole tiles, whose band has zeros for what these add.
inline ConvView whole_tiles(const ConvView& view) {
  const winograd::TileAxis columns(view.J, 1, kOutputs);
  ConvView whole = view;
  whole.J =
      columns.begin(columns.count - 1) + kOutputs - (columns.is_full(columns.count - 1) ? 0 : 1);
  return whole;
}

inline int64_t computed_rows(int64_t rows) {
  int64_t computed = 0;
  for (int64_t i = 0; i < rows; i += kSumTiles[group_sum_tile(rows - i)])
    computed += kSumTiles[group_sum_tile(rows - i)];
  return computed;
}

// Transforms `rows` rows of a tile's columns, the first at src, to [point][row][lanes].
template <bool kFull>
inline void transform_source(const float* src, int64_t src_row, int64_t rows, float* to) {
  using V = Vec<float>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t r = 0; r < rows; ++r, src += src_row, to += kL) {
    V::Type d[kPoints], v[kPoints];
#pragma GCC unroll 6
    for (int s = 0; s < kPoints - (kFull ? 0 : 1); ++s) d[s] = V::load(src + s * kL);
    winograd::transform_input<kFull>(d, v);
#pragma GCC unroll 6
    for (int p = 0; p < kPoints - (kFull ? 0 : 1); ++p) V::store(to + p * kPlane, v[p]);
  }
}

}  // namespace torchconv::cpu::group_winograd
