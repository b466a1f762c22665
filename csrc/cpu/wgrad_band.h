// A padded copy of what a chunk of pixels reads of x, for few channels: with the padding written
// out, all taps see the same pixels at constant distances, so that channels and taps together fill
// the rows of a register tile which a single tap would leave mostly empty.
//
// The pieces of a chunk that are neighbouring rows of a sample share a segment, its rows of x;
// where a chunk is shorter than a row, each piece has one of its own, of the columns it needs.
// Scratch is [channel][row][column] or [row][column][channel], as x is.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/conv_pack.h"
#include "cpu/wgrad_pixels.h"

namespace torchconv::cpu {

class WgradBand {
 public:
  // `channels` of one group are side by side in scratch.
  WgradBand(const ConvView& view, const WgradPixels& pixels, int64_t channels);

  bool fits() const { return fits_; }  // else the taps are too far apart for scratch
  int64_t size() const { return size_; }
  int64_t channel_stride() const { return channel_; }
  int64_t step() const { return view_.step_w * column_; }  // between pixels
  int64_t tap_offset(int64_t tap) const {
    return (view_.taps[tap].h - first_h_) * row_ + (view_.taps[tap].w - first_w_) * column_;
  }

  // Copies n channels from x, which is at the first of them, and lists the runs that read them:
  // their x is the offset of the first pixel in scratch.
  template <typename A>
  int64_t fill(const A* x, int64_t n, const PixelPiece* pieces, int64_t count, A* scratch,
               TapPixels* runs) const;

 private:
  template <typename A>
  void copy_row(const A* x, int64_t n, int64_t h, int64_t w, int64_t width, A* to) const;

  const ConvView& view_;
  bool fits_, whole_rows_;
  int64_t first_h_, first_w_, span_h_, span_w_;  // of the taps
  int64_t channel_, row_, column_, size_;        // strides, and all of scratch
};

// Columns [w, w + width) of row h of the image, zero outside it.
template <typename A>
void WgradBand::copy_row(const A* x, int64_t n, int64_t h, int64_t w, int64_t width, A* to) const {
  const bool outside = h < 0 || h >= view_.H;
  const auto [begin, end] = outside ? Range{0, 0} : valid_range(width, 1, w, view_.W);
  const A* from = x + h * view_.src.row + w * view_.src.column;
  if (column_ == 1 && view_.src.column == 1) {
    for (int64_t c = 0; c < n; ++c, from += view_.src.c, to += channel_)
      copy_padded_row(to, from, 1, begin, end, width);
  } else if (n == view_.src.column) {
    copy_padded_row(to, from, 1, begin * n, end * n, width * n);
  } else {
    std::fill(to, to + width * column_, A{});
    for (int64_t i = begin; i < end; ++i)
      for (int64_t c = 0; c < n; ++c)
        to[i * column_ + c * channel_] = from[i * view_.src.column + c * view_.src.c];
  }
}

template <typename A>
int64_t WgradBand::fill(const A* x, int64_t n, const PixelPiece* pieces, int64_t count, A* scratch,
                        TapPixels* runs) const {
  const PixelPiece* const end = pieces + count;
  int64_t row = 0;  // of scratch
  for (const PixelPiece* p = pieces; p < end;) {
    const PixelPiece* first = p;
    do {
      const int64_t j = whole_rows_ ? p->j * view_.step_w : 0;
      *runs++ = {(row + (p->i - first->i) * view_.step_h) * row_ + j * column_,
                 p->n * view_.dst.n + p->i * view_.dst.row + p->j * view_.dst.column, p->term,
                 p->count};
      ++p;
    } while (p < end && whole_rows_ && p->n == first->n);
    const int64_t w = first_w_ + (whole_rows_ ? 0 : first->j * view_.step_w);
    const int64_t width = ((whole_rows_ ? view_.J : first->count) - 1) * view_.step_w + span_w_ + 1;
    const int64_t h = first->i * view_.step_h + first_h_;
    const int64_t rows = (p[-1].i - first->i) * view_.step_h + span_h_ + 1;
    for (int64_t r = 0; r < rows; ++r, ++row)
      copy_row(x + first->n * view_.src.n, n, h + r, w, width, scratch + row * row_);
  }
  return count;
}

}  // namespace torchconv::cpu
