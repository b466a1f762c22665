// A band of rows of grouped 3x3 convolution by Winograd's F(4,3) along the rows and F(2,3) along
// the columns, with vectors along channels as in group_tile.h.
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
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu {

inline constexpr int kGroupWinogradTaps = 3, kGroupWinogradOutputs = 4, kGroupWinogradPoints = 6;
// Points of the columns, and rows of outputs that share a load of the weights.
inline constexpr int kGroupWinogradDown = 4, kGroupWinogradRows = 4;
// Lanes that are exchanged most cheaply.
inline constexpr int kGroupQuarter = 4;
inline constexpr bool kGroupWinogradServes = kVectorBytes == 64;

struct GroupWinogradBand {
  const float* src;  // the first tap of the first output, which may lie outside the image
  int64_t src_row, src_column;
  Range src_rows, src_columns;      // in the image, counted from there; the others are zeros
  int64_t src_used;                 // lanes of a pixel that are read; the others are zeros
  int64_t ahead;                    // from a pixel to one that will be read later, or 0
  const winograd::TileAxis* tiles;  // along the rows, of 4 or 3 outputs
  int64_t rows;                     // of outputs
  const float* weights;  // [point of a row][lane ^ channel or channel][point of a column] vectors
  int64_t channels;      // of a group, a multiple of kGroupQuarter for exchanges
  const LaneIndex<float>* lanes;  // of channel 0 for each lane; null: lanes are exchanged
  const float* bias;              // a vector
  float* dst;
  int64_t dst_row, dst_column;
  int64_t used;  // lanes that are written
  bool stream;   // past the caches: every vector of dst is whole and aligned
  bool clamp;    // to [0, high]
  float high;
  SourcePrefetch* fetch;  // of which `lines` are asked for with a point of some rows
  int64_t lines;
  float* scratch;  // kGroupWinogradScratch
};

// Elements of the points of source rows that wait for those below them, and of the products' sums.
inline constexpr int64_t kGroupWinogradRow = kGroupWinogradPoints * Vec<float>::kLanes;
inline constexpr int64_t kGroupWinogradScratch = 64 * kGroupWinogradRow;

// False where an output, before its bias, is infinite or NaN.
bool group_winograd_rows(const GroupWinogradBand& band);

}  // namespace torchconv::cpu
