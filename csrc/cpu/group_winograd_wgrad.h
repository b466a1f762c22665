// The products of the weight gradient of 3x3 grouped convolution by Winograd's F(3,4) along the
// rows: half of the multiplications. For the blocks and bands of group_wgrad.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"
#include "cpu/group_band.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu {

// Where group_winograd_applies (group_winograd.h).
class GroupWinogradDot {
 public:
  explicit GroupWinogradDot(const ConvView& view);

  const GroupBand& band() const { return band_; }
  // Elements of a block's sums, [vector of filters][point][channel][row of taps][lanes].
  int64_t sums() const;
  // How many sums in registers a band adds to each of them.
  int64_t dots() const { return ceil_div(columns_.count, tiles_); }
  int64_t scratch() const;
  // Whether the first of some blocks reads whole rows, in the order of memory: all blocks then have
  // their turn together.
  bool reads_rows() const { return reads_rows_; }

  // Adds the products of `rows` rows from i0 on of a sample's block, which is one of `together`
  // that have their turn with the same rows.
  void add(const float* dz, const float* x, int64_t block, const Range& together, int64_t i0,
           int64_t rows, float* scratch, float* sums) const;
  // Sums to gradients [vector of filters][row of taps][channel][tap][lanes].
  void transform(const float* sums, float* taps) const;

 private:
  // What the next band or sample reads of x and dz, which are this block's planes.
  void expect_next(const float* dz, const float* x, int64_t block, int64_t i0, int64_t rows,
                   SourcePrefetch& ahead) const;

  const ConvView& view_;
  const GroupBand band_;
  const bool reads_rows_;
  const winograd::TileAxis columns_;
  const std::vector<LaneIndex<float>> lanes_;
  int64_t tiles_;             // that are multiplied together
  int64_t x_tile_, dz_tile_;  // elements of a point of a tile
};

}  // namespace torchconv::cpu
