// The source of winograd_rows.cpp: how a row of taps is cut into groups of at most three, and the
// points of these groups along a row of the image.
//
// Group by group a tile reads neighbouring columns a step apart. They lie in phases: every so many
// columns that a tile's outputs are apart, so that vectors run along tiles. A row is copied between
// its padding and transposed into its phases; a row of one channel with few of them is split.
#pragma once

#include <vector>

#include "cpu/conv_view.h"
#include "cpu/winograd_rows_transforms.h"

namespace torchconv::cpu::winograd::rows {

// Taps of a row, a step apart.
struct TapGroup {
  int64_t column;  // of the first, from the row's first tap
  int taps;
  int64_t plane;  // of the first point, among those of a channel
};

// A row of so many neighbouring taps: of each phase of the step three at a time, then what is left.
// The groups of three come first, then those of two.
std::vector<TapGroup> tap_groups(int64_t columns, int64_t step);
int64_t planes_of(const std::vector<TapGroup>& groups);

class Source {
 public:
  // plane: tiles of a row, a whole number of vectors. The taps of a row are neighbours.
  Source(const ConvView& view, int64_t plane);

  int64_t channel() const { return planes_of(groups_) * plane_; }
  int64_t scratch_size() const { return phases_offset_ + C_ * apart_ * phase_; }
  // Once for each scratch.
  void prepare(float* scratch) const { std::fill_n(scratch, scratch_size(), 0.0f); }
  // [channel][plane][tile] of row h of an image, or of zeros beside it.
  void transform(const float* image, int64_t h, float* scratch, float* to) const;

 private:
  template <int kTaps>
  void transform_group(const float* phases, const int64_t* inputs, float* to) const;

  int64_t C_, H_, W_, step_, plane_;
  ConvStrides strides_;
  std::vector<TapGroup> groups_;
  std::vector<int64_t> inputs_;  // [group][point], in the phases of a channel
  int64_t apart_;                // columns from a tile to the next
  int64_t phase_;                // of each phase, with what the last tile reads beyond
  Range columns_;                // of the image that are read
  int64_t first_column_;         // of the first tile
  int64_t tiles_;                // that read a column of the image
  int64_t line_;                 // a row of a channel, or of all where these are neighbours
  int64_t phases_offset_;
};

}  // namespace torchconv::cpu::winograd::rows
