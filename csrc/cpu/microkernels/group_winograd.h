// A column of tiles of grouped 3x3 convolution by Winograd's F(4,3) along the rows and F(2,3) along
// the columns, with vectors along channels as in group_tile.h: `rows` rows of four or three
// outputs.
//
// Where a group has as many lanes of filters as of channels, a power of two, the products of a
// point with all of them are those of lanes l with l ^ x, x = 0, 1, ..: three of four exchanges
// stay within 128 bits, and the first is none. (A broadcast from memory to a whole vector is no
// cheaper than a permutation by an index, and a core has but one of these for each multiplication.)
// Two tiles share a load of the weights, of which a core has one for each multiplication too.
//
// Without the registers for it, it is no faster than group_tile.h, and not chosen.
#pragma once

#include <cstdint>

#include "core/range.h"
#include "cpu/microkernels/group_tile.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {

inline constexpr int kGroupWinogradTaps = 3, kGroupWinogradOutputs = 4, kGroupWinogradPoints = 6;
// Points of the columns, and rows of outputs that share a load of the weights.
inline constexpr int kGroupWinogradDown = 4, kGroupWinogradRows = 4;
// Lanes that are exchanged most cheaply.
inline constexpr int kGroupQuarter = 4;
inline constexpr bool kGroupWinogradServes = kVectorBytes == 64;

// Rows of pixels of one vector each, from the first tap of a tile's first output on.
struct GroupPixels {
  const float* src;
  int64_t row, column;
  int64_t begin, end;  // of the rows in the image; the others are zeros
  int64_t ahead;       // from a pixel to one that will be read later, or 0
};

struct GroupWinogradTile {
  GroupPixels src;
  int64_t rows;          // of outputs; two more are read
  const float* weights;  // [point of a row][lane ^ channel or channel][point of a column] vectors
  int64_t channels;      // of a group, a multiple of kGroupQuarter for exchanges
  const LaneIndex<float>* lanes;  // of channel 0 for each lane; null: lanes are exchanged
  const float* bias;              // a vector
  bool full;                      // four columns, else three
  float* dst;
  int64_t dst_row, dst_column;
  int64_t columns, used;  // that exist, and lanes that are written
  bool stream;            // past the caches: every vector of dst is whole and aligned
  bool clamp;             // to [0, high]
  float high;
  SourcePrefetch* fetch;  // of which `lines` are asked for with a point of some rows
  int64_t lines;
  float* scratch;  // group_winograd_scratch(rows)
};

// Elements of the points of source rows, of which the last products may read more than there are,
// and of their products' sums.
inline constexpr int64_t kGroupWinogradRow = kGroupWinogradPoints * Vec<float>::kLanes;
inline int64_t group_winograd_scratch(int64_t rows) {
  return (2 * round_up(rows, kGroupWinogradRows) + kGroupWinogradTaps - 1) * kGroupWinogradRow;
}

// False where an output, before its bias, is infinite or NaN.
bool group_winograd_tile(const GroupWinogradTile& tile);

}  // namespace torchconv::cpu
