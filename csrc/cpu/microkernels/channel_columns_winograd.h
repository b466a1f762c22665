// The register kernel of depthwise convolution with channels contiguous (NHWC) and a stride of 1 by
// minimal filtering (Winograd, "Arithmetic Complexity of Computations", 1980, chapter 5). A lane is
// a channel; a tile is two output rows of a few columns. Down each column of the kernel its first
// three taps are F(2,3), each further pair is F(2,2) (Karatsuba's), and as all of these use only
// the points 0, 1, -1 and infinity they share four sums, of which two outputs are made: 4, 7 and 10
// products for a kernel of 3, 5 and 7 rows, where two outputs take 6, 10 and 14 directly. Along a
// row the tile is a direct convolution, so transformed pixels serve several columns. A kernel of 3
// walks long rows without tiles.
#pragma once

#include <cstdint>

#include "cpu/microkernels/channel_columns.h"

namespace torchconv::cpu {

// Enough vector registers for the sums and sources of a tile.
#if defined(__AVX512F__)
inline constexpr bool kFiltersColumns = true;
#else
inline constexpr bool kFiltersColumns = false;
#endif

// Output columns of a tile: what maps of 7, 14, 28, 56 and 112 pixels are made of.
inline constexpr int kWinogradTile = 7;

constexpr int64_t winograd_column_products(int64_t R) { return R / 2 * 3 + 1; }

// Where a product's weights lie; part 0 is that of the first three taps. D's follow A's.
constexpr int product_b(int part) { return part == 0 ? 0 : part + 1; }
inline constexpr int kProductC = 1;
constexpr int product_a(int R, int part) { return R / 2 + 1 + 2 * part; }

// Pairs of neighbouring output rows.
struct ChannelColumnsWinograd {
  const float* src;  // row 0, at the column of the first tap
  int64_t src_row, src_rows;
  float* out;  // row `first`
  int64_t out_row, out_step;
  int64_t first, last;   // output rows
  int64_t first_h;       // the source row of the first tap of output row 0
  const float* zeros;    // as many source columns of them as a tile reads
  const float* weights;  // of each vector of channels, as winograd_column_weights makes them
  const float* start;    // of all sums, by channel
  bool fetches;          // of tiles, what the next pair of rows reads; long rows always do
  int64_t fetch_end;     // what the next pair writes, if it ends before this row
  bool streams;          // past the caches
  bool clamps;           // the outputs, to [0, most]
  float most;
};

// columns >= kWinogradTile, a step of 1. False where a sum is not finite: the rows are then not to
// be trusted.
bool channel_columns_winograd(const ChannelColumns& shape, const ChannelColumnsWinograd& rows);

// Whether rows are walked column by column, so that no tiles overlap at their ends: long rows,
// whose columns do not share too few sets of the first cache.
inline bool channel_columns_walk(const ChannelColumns& p) {
  return p.R == 3 && p.columns > 2 * kWinogradTile && p.pitch * int64_t{sizeof(float)} % 1024 != 0;
}

// From the taps [R*R][lanes] of a vector of channels to its [products*R][lanes].
void winograd_column_weights(int64_t R, const float* taps, float* weights);

}  // namespace torchconv::cpu
