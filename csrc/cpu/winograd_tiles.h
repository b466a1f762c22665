// How a convolution is cut for Winograd, and where its pieces lie in scratch memory.
//
// An axis of the destination is cut into full tiles of 4 outputs, of 2 where the kernel has 5 taps
// instead of 3, and, where that fits better, of one fewer. With dilation d the positions i, i + d,
// i + 2d, ... are a phase, the axis of a convolution of its own without dilation, and the tiles of
// one phase follow those of the other. The tiles of all samples and phases are one list; a
// TileBlock is a piece of it. Within a block every tile has a slot, ordered by its height and width
// so that the tiles that have a product with infinity along the rows, the columns or both are a
// range of slots each.
//
//   V [channel block][point][channel vector][slot][lanes]   transformed source
//   U [channel block][point][channel][kPanel]               transformed weights of one panel
//   M [slot][point][kPanel]                                 products of one panel
//
// A is the type that all of it is computed in: float or double.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_view.h"
#include "cpu/microkernels/winograd_gemm.h"
#include "cpu/winograd_transforms.h"

namespace torchconv::cpu::winograd {

template <typename A>
inline constexpr int64_t kLine = 64 / sizeof(A);
// Products are summed in registers over at most so many channels, and these sums in M: the error
// grows with the longer of the two chains.
inline constexpr int64_t kChannelBlock = 64;
// Of the largest kernel.
inline constexpr int64_t kMostTaps = 5 * 5;

// Strides of an odd number of cache lines spread over all sets of a cache.
template <typename A>
constexpr int64_t odd_lines(int64_t elements) {
  return ceil_div(elements, kLine<A>) / 2 * 2 * kLine<A> + kLine<A>;
}

class TileAxis {
 public:
  int64_t outputs, dilation, count;
  int64_t full;  // outputs of a full tile

  TileAxis(int64_t size, int64_t step, int64_t tile)
      : outputs(size),
        dilation(step),
        full(tile),
        long_phases_((size - 1) % step + 1),
        long_(ceil_div(size, step), tile),
        short_(long_.outputs - 1, tile) {
    count = long_phases_ * long_.count + (std::min(step, size) - long_phases_) * short_.count;
  }
  bool is_full(int64_t tile) const { return place(tile).is_full(); }
  // Of the destination: the first, and from there to the last, `dilation` apart.
  int64_t begin(int64_t tile) const {
    const Place p = place(tile);
    return p.phase + p.begin() * dilation;
  }
  int64_t outputs_of(int64_t tile) const {
    const Place p = place(tile);
    return std::min(p.begin() + full - (p.is_full() ? 0 : 1), p.axis->outputs) - p.begin();
  }
  // How many tiles of the phase, and how many full ones, there are from this one on.
  int64_t rest(int64_t tile) const {
    const Place p = place(tile);
    return p.axis->count - p.tile;
  }
  int64_t fulls(int64_t tile) const {
    const Place p = place(tile);
    return std::max(p.axis->fulls - p.tile, int64_t{0});
  }
  // Points of all tiles: what the products of an axis cost.
  int64_t points() const {
    const int64_t short_phases = std::min(dilation, outputs) - long_phases_;
    return long_phases_ * long_.points() + short_phases * short_.points();
  }

 private:
  struct Phase {
    int64_t outputs, full, count;
    int64_t fulls;  // the first tiles; the others have one output fewer
    Phase(int64_t size, int64_t tile) : outputs(size), full(tile), count(ceil_div(size, tile)) {
      fulls = count - std::min(count, full * count - size);
    }
    int64_t points() const { return kPoints * fulls + (kPoints - 1) * (count - fulls); }
  };
  struct Place {
    const Phase* axis;
    int64_t phase, tile;
    bool is_full() const { return tile < axis->fulls; }
    int64_t begin() const { return axis->full * tile - std::max(tile - axis->fulls, int64_t{0}); }
  };
  Place place(int64_t tile) const {
    const int64_t in_long = long_phases_ * long_.count;
    if (tile < in_long) return {&long_, tile / long_.count, tile % long_.count};
    tile -= in_long;
    return {&short_, long_phases_ + tile / short_.count, tile % short_.count};
  }

  int64_t long_phases_;  // the first ones, with one output more than the others
  Phase long_, short_;
};

// Taps along an axis of a square kernel; 0 for one that has no transform.
inline int kernel_side(const ConvView& view) {
  return view.taps.size() == 9 ? 3 : view.taps.size() == 25 ? 5 : 0;
}
// Of the rows or columns that taps lie on: the first, and the distance from one to the next.
inline int64_t first_tap(const ConvView& view, int64_t ConvTap::* axis) {
  int64_t first = view.taps[0].*axis;
  for (const ConvTap& tap : view.taps) first = std::min(first, tap.*axis);
  return first;
}
inline int64_t tap_step(const ConvView& view, int64_t ConvTap::* axis) {
  int64_t last = view.taps[0].*axis;
  for (const ConvTap& tap : view.taps) last = std::max(last, tap.*axis);
  return (last - first_tap(view, axis)) / (kernel_side(view) - 1);
}

// Where the taps of a filter's channel lie: `count` elements, row by row of the kernel.
struct TapOffsets {
  int64_t count;
  const int64_t* at;
  int64_t operator[](int64_t tap) const { return at[tap]; }
};

// The tiles of one sample's problem.
struct Grid {
  const ConvView& view;
  int side;  // taps along an axis
  TileAxis rows, columns;
  int64_t h, w;                   // source offset of tap (0, 0)
  int64_t tap_weight[kMostTaps];  // ConvTap::weight of tap (r, s)

  explicit Grid(const ConvView& v)
      : view(v),
        side(kernel_side(v)),
        rows(v.I, tap_step(v, &ConvTap::h), tile_outputs(side)),
        columns(v.J, tap_step(v, &ConvTap::w), tile_outputs(side)),
        h(first_tap(v, &ConvTap::h)),
        w(first_tap(v, &ConvTap::w)) {
    for (const ConvTap& tap : v.taps)
      tap_weight[(tap.h - h) / rows.dilation * side + (tap.w - w) / columns.dilation] = tap.weight;
  }

  TapOffsets taps() const { return {int64_t{side} * side, tap_weight}; }
  int64_t tiles() const { return view.N * rows.count * columns.count; }
};

// What depends on one sample's problem only.
template <typename A>
struct Plan : Grid {
  int64_t vectors;                // of channels
  int64_t blocks, block_vectors;  // of channels; the last may have fewer
  int64_t panels;                 // of filters

  explicit Plan(const ConvView& v)
      : Grid(v),
        vectors(ceil_div(v.C, kLanes<A>)),
        blocks(ceil_div(v.C, kChannelBlock)),
        block_vectors(ceil_div(vectors, blocks)),
        panels(ceil_div(v.K, kPanel<A>)) {
    blocks = ceil_div(vectors, block_vectors);
  }

  int64_t vectors_in(int64_t block) const {
    return std::min(block_vectors, vectors - block * block_vectors);
  }
  // Rounded up to the step of the matrix product.
  int64_t channels_in(int64_t block) const {
    const int64_t first = block * block_vectors * kLanes<A>;
    return round_up(std::min(block_vectors * kLanes<A>, view.C - first), kWinogradStep<A>);
  }
};

// Neighbouring tiles of one row of tiles and one phase of columns: `wide` of full width, then the
// others.
struct Segment {
  int64_t n, i, j, count, wide;
  int64_t wide_slot, narrow_slot;  // of the first of each
};

class TileBlock {
 public:
  TileBlock(const Grid& grid, int64_t first, int64_t count) : tiles_(count) {
    const int64_t across = grid.columns.count, down = grid.rows.count;
    int64_t short_wide = 0, short_narrow = 0;
    for (int64_t tile = first; tile < first + count;) {
      Segment s{};
      s.n = tile / across / down;
      s.i = tile / across % down;
      s.j = tile % across;
      s.count = std::min(grid.columns.rest(s.j), first + count - tile);
      s.wide = std::min(grid.columns.fulls(s.j), s.count);
      const bool tall = grid.rows.is_full(s.i);
      int64_t& wide = tall ? tall_wide_ : short_wide;
      int64_t& narrow = tall ? tall_narrow_ : short_narrow;
      s.wide_slot = wide;
      s.narrow_slot = narrow;
      wide += s.wide;
      narrow += s.count - s.wide;
      const bool same_row =
          !segments_.empty() && segments_.back().n == s.n && segments_.back().i == s.i;
      segments_.push_back(s);
      if (!same_row) strips_.push_back({strips_.empty() ? 0 : strips_.back().end, 0});
      strips_.back().end = static_cast<int64_t>(segments_.size());
      tile += s.count;
    }
    short_wide_ = short_wide;
    // Tall and narrow, tall and wide, short and wide, short and narrow.
    for (Segment& s : segments_) {
      const bool tall = grid.rows.is_full(s.i);
      s.wide_slot += tall_narrow_ + (tall ? 0 : tall_wide_);
      if (!tall) s.narrow_slot += tall_narrow_ + tall_wide_ + short_wide_;
    }
  }

  int64_t tiles() const { return tiles_; }
  const std::vector<Segment>& segments() const { return segments_; }
  // The segments of each row of tiles: they share their source rows.
  const std::vector<Range>& strips() const { return strips_; }
  // The slots whose tiles have point (r, s).
  Range slots(int r, int s) const {
    constexpr int kLast = kPoints - 1;
    const int64_t tall = tall_narrow_ + tall_wide_;
    const int64_t begin = s == kLast ? tall_narrow_ : 0;
    const int64_t end = r == kLast ? tall : s == kLast ? tall + short_wide_ : tiles_;
    return {begin, std::max(begin, end)};
  }

 private:
  int64_t tiles_;
  int64_t tall_narrow_ = 0, tall_wide_ = 0, short_wide_ = 0;
  std::vector<Segment> segments_;
  std::vector<Range> strips_;
};

// Strides of V for blocks of at most `slots` tiles.
template <typename A>
struct SourceLayout {
  int64_t vector, point, block;

  SourceLayout(const Plan<A>& plan, int64_t slots)
      : vector(odd_lines<A>(slots * kLanes<A>)),
        point(odd_lines<A>(plan.block_vectors * vector)),
        block(kProducts * point) {}
  int64_t size(const Plan<A>& plan) const { return plan.blocks * block; }
};

// Strides of U.
template <typename A>
struct WeightLayout {
  int64_t point, block, panel;

  explicit WeightLayout(const Plan<A>& plan)
      : point(odd_lines<A>(plan.block_vectors * kLanes<A> * kPanel<A>)),
        block(kProducts * point),
        panel(plan.blocks * block) {}
};

// From one slot of M to the next.
template <typename A>
inline constexpr int64_t kProductSlot = odd_lines<A>(kProducts * kPanel<A>);
// And where M has one vector of filters and its columns are transformed,
// [slot][row][column][lanes].
template <typename A>
inline constexpr int64_t kColumnRow = kPoints * kLanes<A>;
template <typename A>
inline constexpr int64_t kColumnSlot = odd_lines<A>(tile_outputs(3) * kColumnRow<A>);

}  // namespace torchconv::cpu::winograd
