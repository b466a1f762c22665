// Rows of a group's planes by Winograd's F(4,3) along the rows and F(2,3) along the columns, with
// vectors along tiles: every weight is one number for all of a vector, so no lanes are exchanged
// for the products, and those of planes need no transposition of channels.
//
// A vector holds the tiles of a row, or of rows of as many segments as fill it: segment g computes
// rows from g * segment_rows on. Source rows are transformed once; the points of the last two wait
// for the next rows of outputs.
#pragma once

#include <cstdint>

#include "cpu/microkernels/group_winograd.h"

namespace torchconv::cpu {

// Rows of outputs of each segment that are computed together, and tiles of a vector.
inline constexpr int64_t kGroupPlanesRows = 4, kGroupPlanesTiles = Vec<float>::kLanes;
inline constexpr int64_t kGroupPlanesSegments = 4;
// Of these rows, the source rows.
inline constexpr int64_t kGroupPlanesSource = kGroupPlanesRows + kGroupWinogradTaps - 1;

inline constexpr int64_t kGroupPlanesStaged =
    (kGroupPlanesRows * kGroupWinogradOutputs + kGroupPlanesSegments) * kGroupPlanesTiles;

struct GroupPlanes {
  const float* src;  // the group's
  int64_t src_channel, src_row, H, W;
  int64_t first_h, first_w;  // of the taps from an output
  int64_t channels, filters;
  // [point of a row][channel][point of a column] vectors of filters, from the group's first on.
  const float* weights;
  const float* bias;  // of the filters
  float* dst;         // the group's; or null: `store` finishes rows
  // Past the caches: every row is whole vectors, or rows follow each other and those of a segment
  // and of each kGroupPlanesRows are, aligned.
  bool stream;
  int64_t dst_filter, dst_row, I, J;  // J: at most what four vectors of `segments` rows hold
  int64_t segments, segment_rows;     // a power of two up to 4, and a multiple of 2
  bool clamp;                         // to [0, high]
  float high;
  // Finishes n sums of a row, with their bias, that belong at an offset from the group's outputs.
  void (*store)(float* sums, int64_t n, int64_t offset, const void* context);
  const void* context;
  SourcePrefetch* fetch;  // of which `lines` are asked for with a point of some rows
  int64_t lines;
  float* scratch;  // group_planes_scratch
};

// Elements of the points of source rows and outputs, and of finished rows of all segments.
inline int64_t group_planes_scratch(int64_t channels, int64_t filters) {
  return (channels * kGroupPlanesSource + filters * kGroupPlanesRows) * kGroupWinogradRow +
         filters * kGroupPlanesStaged;
}

// False where an output, before its bias, is infinite or NaN.
bool group_winograd_planes(const GroupPlanes& planes);

}  // namespace torchconv::cpu
