// How a convolution of stride 2 is cut for Winograd, and where its pieces lie in scratch memory.
//
// An axis of the destination is cut into tall tiles and short ones of one unit less. A unit is an
// output of fprop, and two neighbouring elements of dgrad's.
//
// Kernels of three (Axis::kDown, kUp...): along an axis a tall tile has 5 points, which are a
// transform's, and 4 plain products, all with the middle tap. So there are 6 x 6 planes of weights:
// 25 for pairs of points (kBoth), 5 for a point of the rows and the middle tap of the columns
// (kRows), 5 the other way round (kColumns) and 1 for the middle tap itself (kNeither), where a
// tile has 4 or 4 x 4 products in each.
//
// Larger kernels of few channels (kFold, kUnfold): the four phases of a unit, two each way, are
// channels of their own, of a convolution of stride 1 with at most four taps each way. A tall tile
// has 6 points for 3 units, and all planes are kBoth.
//
// The products of a plane are rows of one matrix product:
//
//   V [channel block][plane][channel vector][row][lanes]   transformed source
//   U [panel][channel block][plane][channel][kFilters]     transformed weights
//   M [kind][row][plane of its kind][kFilters]             products of one panel
//
// The tiles of all samples are one list; a TileBlock is a piece of it. Within a block every tile
// has a slot, in the order tall narrow, tall wide, short wide, short narrow, so that the tiles with
// a product at the last point of the rows, of the columns or of both are a range each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"
#include "cpu/winograd_strided_transforms.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd_strided {

// Products are summed in registers over at most so many channels, and these sums in M: for
// accuracy, and so that the U of a block stays in the second-level cache where it has just been
// transformed.
inline constexpr int64_t kChannelBlock = 64;
inline constexpr int64_t kVector = kLanes<float>;
inline constexpr int64_t kFilters = kPanel<float>;  // of a panel
constexpr int64_t odd_lines(int64_t elements) { return winograd::odd_lines<float>(elements); }

inline constexpr int kSide = 6;  // planes of weights along an axis
inline constexpr int kPlanes = kSide * kSide;
inline constexpr int kTaps = 3;  // of the kernels with a middle tap

// How an axis goes from source to destination.
enum class Axis {
  kDown,      // fprop: every other pixel to the transform, those between are plain
  kUpFirst,   // dgrad: of a unit's two elements the first comes from the transform
  kUpSecond,  // the same, the second
  kFold,      // fprop: two neighbouring pixels are one, of twice the channels
  kUnfold,    // dgrad: a unit's two elements are one, of twice the filters
};
constexpr bool folds(Axis axis) { return axis == Axis::kFold || axis == Axis::kUnfold; }

enum Kind { kBoth, kRows, kColumns, kNeither, kKinds };

// What a tile of each family has.
struct Shape {
  int points;     // of a tall tile
  int64_t units;  // of a tall tile

  constexpr explicit Shape(Axis axis)
      : points(folds(axis) ? quad::kPoints : pair::kPoints),
        units(folds(axis) ? quad::kOutputs : pair::kOutputs) {}
  constexpr bool has_plain() const { return points < kSide; }
  constexpr Kind kind(int r, int s) const {
    return r < points ? s < points ? kBoth : kRows : s < points ? kColumns : kNeither;
  }
  constexpr int planes(int kind) const {
    if (kind == kBoth) return points * points;
    return !has_plain() ? 0 : kind == kNeither ? 1 : points;
  }
  // Of plane (r, s) among those of its kind.
  constexpr int index(int r, int s) const {
    return r < points ? s < points ? r * points + s : r : s < points ? s : 0;
  }
  // Most rows of a tile in each kind.
  constexpr int64_t rows(int kind) const {
    return kind == kBoth ? 1 : kind == kNeither ? units * units : units;
  }
  // Of a tall tile along an axis.
  constexpr int64_t products() const { return points + (has_plain() ? units : 0); }
};

struct AxisPlan {
  Axis form;
  Shape shape;
  int64_t source;              // where the source of unit 0 begins
  int64_t outputs;             // elements of the destination
  int64_t units, count, tall;  // tiles: the first `tall` of them, then short ones

  AxisPlan(Axis axis, int64_t first, int64_t size)
      : form(axis), shape(axis), source(first), outputs(size) {
    units = ceil_div(size, per_unit());
    count = ceil_div(units, shape.units);
    tall = count - std::min(count, shape.units * count - units);
  }
  bool is_tall(int64_t tile) const { return tile < tall; }
  int64_t begin(int64_t tile) const {
    return shape.units * tile - std::max(tile - tall, int64_t{0});
  }
  // Source positions and outputs of a unit.
  int64_t step() const { return form == Axis::kDown ? 2 : 1; }
  int64_t per_unit() const { return form == Axis::kDown || form == Axis::kFold ? 1 : 2; }
  int64_t source_begin(int64_t tile) const { return source + begin(tile) * step(); }
  int64_t output_begin(int64_t tile) const { return std::min(begin(tile) * per_unit(), outputs); }
  int64_t products() const {
    return count * shape.products() - (count - tall) * (shape.has_plain() ? 2 : 1);
  }
  // Source positions that `n` units see.
  int64_t source_size(int64_t n) const { return n * step() + (folds(form) ? quad::kTaps - 1 : 1); }
};

// What depends on one sample's problem only.
struct Plan {
  ConvView view;  // without taps; the grid is all of the destination
  AxisPlan rows, columns;
  // Kernels with a middle tap: offsets of the outer taps of an axis, then of that one.
  int64_t tap_weight[kTaps * kTaps];
  // Kernels that fold: where the taps of each phase of a unit lie in the window, -1 for none.
  struct Fold {
    int64_t channels, H, W, pad_top, pad_left;  // of the image
    int64_t weight_channel, weight_other;       // strides
    int64_t row_taps[2][quad::kTaps], column_taps[2][quad::kTaps];
  } fold;
  int64_t vectors;                // of channels
  int64_t blocks, block_vectors;  // of channels; the last may have fewer
  int64_t panels;                 // of filters

  const Shape& shape() const { return rows.shape; }
  int64_t tiles() const { return view.N * rows.count * columns.count; }
  int64_t vectors_in(int64_t block) const {
    return std::min(block_vectors, vectors - block * block_vectors);
  }
  // Rounded up to the step of the matrix product.
  int64_t channels_in(int64_t block) const {
    const int64_t first = block * block_vectors * kVector;
    return round_up(std::min(block_vectors * kVector, view.C - first), kWinogradStep<float>);
  }
};

// Rows of the matrix products of each kind.
struct Rows {
  int64_t of[kKinds];
};

// Neighbouring tiles of one row of tiles: `wide` of them wide, then narrow ones.
struct Segment {
  int64_t n, i, j, count, wide;
  int64_t wide_slot, narrow_slot;  // of the first of each
};

class TileBlock {
 public:
  TileBlock(const Plan& plan, int64_t first, int64_t count);

  int64_t tiles() const { return tiles_; }
  const std::vector<Segment>& segments() const { return segments_; }
  // Where the rows of a slot begin.
  Rows rows(int64_t slot) const {
    const int64_t least = shape_.units - 1;
    const int64_t wide = std::min(std::max(slot - tall_narrow_, int64_t{0}), wide_);
    const int64_t tall = std::min(slot, tall_), tall_wide = std::min(wide, tall_ - tall_narrow_);
    const int64_t across = slot * least + wide, down = slot * least + tall;
    return {{slot, across, down, least * (across + tall) + tall_wide}};
  }
  // The rows that have a product in plane (r, s).
  Range range(int r, int s) const {
    const int last = shape_.points - 1;
    const int64_t begin = s == last ? tall_narrow_ : 0;
    const int64_t end = r == last ? tall_ : s == last ? tall_narrow_ + wide_ : tiles_;
    const Kind kind = shape_.kind(r, s);
    return {rows(begin).of[kind], rows(std::max(begin, end)).of[kind]};
  }

 private:
  Shape shape_;
  int64_t tiles_;
  int64_t tall_narrow_ = 0, tall_ = 0, wide_ = 0;
  std::vector<Segment> segments_;
};

// Strides of V for blocks of at most `slots` tiles.
struct SourceLayout {
  int64_t vector[kKinds], plane[kKinds], kind[kKinds], block;

  SourceLayout(const Plan& plan, int64_t slots) : block(0) {
    for (int k = 0; k < kKinds; ++k) {
      vector[k] = odd_lines(slots * plan.shape().rows(k) * kVector);
      plane[k] = odd_lines(plan.block_vectors * vector[k]);
      kind[k] = block;
      block += plan.shape().planes(k) * plane[k];
    }
  }
  int64_t size(const Plan& plan) const { return plan.blocks * block; }
};

// Strides of U.
struct WeightLayout {
  int64_t plane, block, panel;

  explicit WeightLayout(const Plan& plan)
      : plane(odd_lines(plan.block_vectors * kVector * kFilters)),
        block(kPlanes * plane),
        panel(plan.blocks * block) {}
};

// Strides of M.
struct ProductLayout {
  int64_t row[kKinds], kind[kKinds], panel;

  ProductLayout(const Shape& shape, int64_t slots) : panel(0) {
    for (int k = 0; k < kKinds; ++k) {
      row[k] = k == kBoth ? odd_lines(shape.planes(k) * kFilters) : shape.planes(k) * kFilters;
      kind[k] = panel;
      panel += slots * shape.rows(k) * row[k];
    }
  }
};

}  // namespace torchconv::cpu::winograd_strided
