// A column of tiles of grouped 3x3 convolution by Winograd's F(4,3) along the rows, with vectors
// along channels as in group_tile.h: `rows` rows of four or three outputs.
//
// It goes down the source two rows at a time. Their points, transformed a step ahead, are permuted
// to the c-th channel of every lane's group and add to four rows of sums in registers, of which two
// are then complete. So the source is read once, a load of the weights serves two products (a core
// has one load of a whole vector for each multiplication), and nothing but the outputs is written.
// Without registers for 24 sums it is no faster than group_tile.h, and not chosen.
#pragma once

#include <cstdint>

#include "cpu/microkernels/group_tile.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {

inline constexpr int kGroupWinogradTaps = 3, kGroupWinogradOutputs = 4, kGroupWinogradPoints = 6;
// Of the source that share a load of the weights.
inline constexpr int kGroupWinogradRows = 2;
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
  int64_t rows;                   // of outputs; two more are read
  const float* weights;           // [channel][point][row of taps] vectors
  int64_t channels;               // of a group
  const LaneIndex<float>* lanes;  // of channel 0 for each lane
  const float* bias;              // a vector
  bool full;                      // four columns, else three
  float* dst;
  int64_t dst_row, dst_column;
  int64_t columns, used;  // that exist, and lanes that are written
  bool stream;            // past the caches: every vector of dst is whole and aligned
  bool clamp;             // to [0, high]
  float high;
  SourcePrefetch* fetch;  // of which `lines` are asked for with every pair of rows
  int64_t lines;
};

// False where an output, before its bias, is infinite or NaN.
bool group_winograd_tile(const GroupWinogradTile& tile);

}  // namespace torchconv::cpu
