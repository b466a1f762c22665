// A band of a channels_last image for the matrix product that reads its operand in place: some
// channels of what a block of output rows and columns reads, copied into cache-sized scratch in the
// computing type with the padding written out. Term (tap t, channel c) of output pixel (i, j) lies
// at i*row_step + j*column_step + tap_offset(t) + c, so the product has no edges, and rows of tiles
// that would fall into the same cache sets are moved apart.
//
// On each axis either all positions that the taps span are copied once, or, where less (a dilation
// or stride larger than the block), those of each tap on their own. Pixels that are neighbours in
// memory are copied by vectors of so many lanes, of which short runs leave most empty: there all
// positions are also copied once where that takes fewer vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Rows of a tile that are a multiple of this apart share few sets of a first-level cache of 64
// sets.
inline constexpr int64_t kAliasedBytes = 4096;

// `total` in even pieces of at most `limit`.
inline int64_t even_piece(int64_t total, int64_t limit) {
  return ceil_div(total, ceil_div(total, std::max<int64_t>(limit, 1)));
}

// The positions of one axis that a block of outputs reads.
class BandAxis {
 public:
  // offsets: the taps' distinct ones, ascending; step: of the source from an output to the next;
  // lanes: see above, or 0.
  BandAxis(std::vector<int64_t> offsets, int64_t step, int64_t outputs, int64_t lanes);

  int64_t positions() const { return positions_; }
  int64_t step() const { return together_ ? source_step_ : 1; }  // in positions
  int64_t position(int64_t tap_offset) const;
  const std::vector<int64_t>& offsets() const { return offsets_; }
  // Of a tap's offset in offsets().
  int64_t rank(int64_t tap_offset) const {
    return std::lower_bound(offsets_.begin(), offsets_.end(), tap_offset) - offsets_.begin();
  }

  // Calls f(position, source, count, source_step) on the runs that `outputs` outputs from `first`
  // read.
  template <typename F>
  void for_runs(int64_t first, int64_t outputs, F&& f) const {
    const int64_t source = first * source_step_;
    if (together_)
      return f(int64_t{0}, source + offsets_.front(),
               (outputs - 1) * source_step_ + offsets_.back() - offsets_.front() + 1, int64_t{1});
    for (int64_t t = 0; t < static_cast<int64_t>(offsets_.size()); ++t)
      f(t * outputs_, source + offsets_[t], outputs, source_step_);
  }

 private:
  std::vector<int64_t> offsets_;
  int64_t source_step_, outputs_;
  bool together_;
  int64_t positions_;
};

struct ChannelBand {
  // For blocks of rows x columns outputs and at most `channels` channels.
  ChannelBand(const ConvView& view, int64_t block_rows, int64_t block_columns, int64_t channels,
              int64_t element_size);

  BandAxis rows, columns;
  int64_t pixel, row;  // strides in scratch
  int64_t size() const { return rows.positions() * row; }

  int64_t row_step() const { return rows.step() * row; }
  int64_t column_step() const { return columns.step() * pixel; }
  int64_t tap_offset(const ConvTap& tap) const {
    return rows.position(tap.h) * row + columns.position(tap.w) * pixel;
  }

  // Calls f(position in scratch, pixels, those of them inside the image, source of the first of
  // these, their distance in the source) on the band's runs of pixels.
  template <typename F>
  void for_pieces(const ConvView& view, Range i, Range j, F&& f) const;

  // Calls f(first, count) on the runs of neighbouring rows of the image that outputs i read.
  template <typename F>
  void for_image_rows(const ConvView& view, Range i, F&& f) const;

  // src: the first of `channels` channels of the sample's pixel (0, 0).
  template <typename T>
  void fill(const ConvView& view, const T* src, int64_t channels, Range i, Range j,
            Wide<T>* scratch) const;
};

template <typename F>
void ChannelBand::for_pieces(const ConvView& view, Range i, Range j, F&& f) const {
  rows.for_runs(i.begin, i.size(), [&](int64_t y, int64_t h, int64_t height, int64_t step_h) {
    for (const int64_t end = y + height; y < end; ++y, h += step_h) {
      const bool outside = h < 0 || h >= view.H;
      columns.for_runs(j.begin, j.size(), [&](int64_t x, int64_t w, int64_t n, int64_t step_w) {
        Range inside = outside ? Range{0, 0} : valid_range(n, step_w, w, view.W);
        if (inside.empty()) inside = {0, 0};
        const int64_t source =
            inside.empty() ? 0 : h * view.src.row + (w + inside.begin * step_w) * view.src.column;
        f(y * row + x * pixel, n, inside, source, step_w * view.src.column);
      });
    }
  });
}

template <typename F>
void ChannelBand::for_image_rows(const ConvView& view, Range i, F&& f) const {
  rows.for_runs(i.begin, i.size(), [&](int64_t, int64_t h, int64_t height, int64_t step) {
    const Range inside = valid_range(height, step, h, view.H);
    if (step == 1 && !inside.empty()) return f(h + inside.begin, inside.size());
    for (int64_t y = inside.begin; y < inside.end; ++y) f(h + y * step, int64_t{1});
  });
}

template <typename T>
void ChannelBand::fill(const ConvView& view, const T* src, int64_t channels, Range i, Range j,
                       Wide<T>* scratch) const {
  for_pieces(view, i, j, [&](int64_t to, int64_t n, Range inside, int64_t from, int64_t step) {
    Wide<T>* pixels = scratch + to;
    fill_zero(pixels, inside.begin * pixel);
    fill_zero(pixels + inside.end * pixel, (n - inside.end) * pixel);
    pixels += inside.begin * pixel;
    if (pixel == channels && step == channels) {
      copy_wide(pixels, src + from, inside.size() * channels);
    } else {
      for (int64_t p = 0; p < inside.size(); ++p)
        copy_wide(pixels + p * pixel, src + from + p * step, channels);
    }
  });
}

}  // namespace torchconv::cpu
