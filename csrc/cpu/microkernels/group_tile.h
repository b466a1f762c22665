// The register tiles of grouped convolution with vectors along channels (group_band.h). A lane of
// the result is a filter; its source channel c lies in the same vector of the band as those of the
// lane's whole group. So one load of a pixel and one permutation, or a broadcast where a single
// group has the vector, give all lanes their c-th channel, and every tap of a row that sees the
// pixel takes it from the register.
//
//   group_sum: out[j] = start + sum over runs, c, s of
//                       w[run][c][s] * channel c of src[run + j*step + s],  j < count
//   group_dot: sums[c][s] += sum over rows and j of
//                            dz[row][j] * channel c of src[row][j*step + s]
//
// A run is a piece of at most kMaxRun neighbouring taps of one row of the kernel.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace torchconv::cpu {

inline constexpr int kMaxRun = 3;

// Outputs of a tile: as many sums as there are registers for, or fewer.
#if defined(__AVX512F__)
inline constexpr int kSumTiles[] = {14, 7, 4};
inline constexpr int kDotTile = 7, kDotChannels = 4;
#else
inline constexpr int kSumTiles[] = {7, 4};
inline constexpr int kDotTile = 4, kDotChannels = 2;
#endif
inline constexpr int kSumTileCount = sizeof(kSumTiles) / sizeof(kSumTiles[0]);

struct TapRun {
  int64_t offset;    // of its first tap's source, in elements
  int64_t channels;  // from the first lane of the group on
};

template <typename A>
struct GroupSum {
  const A* src;      // pixels of a vector each
  const A* weights;  // [run][channel][tap] vectors
  const TapRun* runs;
  int64_t count_runs;
  const LaneIndex<A>* lanes;  // of channel 0 for each lane; null: one group, whose lane is 0
  int64_t step;               // pixels
  const A* start;             // a vector, the bias; or null to add to sums
  const A* sums;              // [count] vectors
  A* out;                     // [count] vectors out_step apart, of which `used` lanes are written
  BFloat16* rounded;          // pairs only, or null: where the sums go instead of out
  int64_t count, out_step, used;
  bool stream;  // past the caches: out is whole and aligned
  bool clamp;
  A low, high;
  const char* next;  // lines next_step bytes apart that are asked for between the products
  int64_t next_lines, next_step;
};
// So many with each channel of a run.
inline constexpr int64_t kNextLines = 2;

// Of the tile for the first of `rest` outputs, in kSumTiles. Two of the smallest are better than
// another and one of them.
inline int64_t group_sum_tile(int64_t rest) {
  if (rest == 2 * kSumTiles[kSumTileCount - 1]) return kSumTileCount - 1;
  for (int64_t tile = 0; tile + 1 < kSumTileCount; ++tile)
    if (rest > kSumTiles[tile] - 3) return tile;
  return kSumTileCount - 1;
}

// Computes a tile of kSumTiles[tile] outputs, of which the first `count` are written.
template <typename A>
using GroupSumKernel = void (*)(const GroupSum<A>& sum);
template <typename A>
GroupSumKernel<A> group_sum_kernel(int64_t taps, int64_t step, bool one_group, int64_t tile);
// The same where a channel is a pair of them (see has_pair_products), always with lanes.
GroupSumKernel<float> group_pair_sum_kernel(int64_t taps, int64_t step, int64_t tile);

template <typename A>
struct GroupDot {
  const A* dz;   // [rows][count] vectors
  const A* src;  // of the run's first tap
  A* sums;       // [channel][tap] vectors
  const LaneIndex<A>* lanes;
  int64_t first_channel;  // lane, added to lanes
  int64_t channels;       // at most kDotChannels
  int64_t rows, count, step;
  int64_t dz_row, src_row;  // elements
  const char* next;         // as those of GroupSum
  int64_t next_lines, next_step;
};
// So many with each tile of kDotTile.
inline constexpr int64_t kNextDotLines = 3;

template <typename A>
void group_dot(const GroupDot<A>& dot, int64_t taps);

}  // namespace torchconv::cpu
