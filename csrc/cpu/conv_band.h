// A band of image rows for convolutions with few channels in a group: copied once into cache-sized
// scratch in the computing type, with the padding written out and the stride's phases apart, so
// that tap t of output pixel (i, j) lies at a constant offset from position i*width + j. The
// kernels then have no edges, no strides and no narrow types: a plane of any width is one long row
// of vectors.
//
// Scratch is [channel of the group][phase_h][phase_w][rows][width][lanes]. Where vectors run along
// pixels there is one lane and one group. Else a lane is an output channel, and holds what that
// channel's group reads: groups narrower than a vector stand side by side in it. A few channels
// that have a group each are packed: there are as many lanes, so that rows lie as in the image,
// and a vector holds several pixels.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// What the taps span, from which follows whether scratch can hold a band. Cheap: no allocation.
struct BandExtent {
  BandExtent(const ConvView& view, bool along_pixels, int64_t element_size, int64_t vector_lanes,
             bool packed = false);

  bool fits;      // else the taps are too far apart for scratch: use the matrix product
  int64_t lanes;  // output channels side by side
  int64_t first_h, first_w, phases_h, phases_w;
  int64_t width;   // positions in a row: J and what the taps add
  int64_t shared;  // of the latter, zeros of two neighbouring rows that are the same ones
  int64_t halo;    // rows of scratch that a band has more than output rows
  double row;      // elements of scratch in a row
};

// Whether the channels of a band along them can be packed. It is then no larger.
bool packs_channels(const ConvView& view, int64_t vector_lanes);

// A view of a few filters whose band does not fit, in pieces of as many columns as do: the pixels
// of a panel would be packed for too few products. Else the view.
std::vector<ConvView> column_pieces(const ConvView& view, int64_t element_size,
                                    int64_t vector_lanes);

struct ConvBand {
  // The band must fit. most_rows: of a band, if not as many as suits the caches.
  ConvBand(const ConvView& view, bool along_pixels, int64_t element_size, int64_t vector_lanes,
           int64_t most_rows = 0, bool packed = false);

  bool pixels;     // vectors run along pixels
  bool packed;     // see packs_channels
  int64_t lanes;   // output channels side by side
  int64_t unit;    // the least number of whole vectors and of whole pixels, in elements
  int64_t blocks;  // of groups (pixels) or lanes
  int64_t band;    // output rows in a band
  int64_t bands;
  int64_t width;                 // positions in a row: J and what the taps add
  int64_t size;                  // elements of scratch
  std::vector<int64_t> offsets;  // [C][taps], in elements

  // Vectors of positions that cover `rows` output rows.
  int64_t positions(int64_t rows, int64_t J) const { return (rows - 1) * width + J; }

  // Copies what output rows [i0, i0 + band) of a block need. src is the sample.
  template <typename T>
  void fill(const ConvView& view, const T* src, int64_t block, int64_t i0, Wide<T>* scratch) const;
  // The same of pairs of channels (channel_pairs.h), each where its half of the channels would be.
  // Only along pixels that are neighbours, of step 1.
  bool fills_pairs(const ConvView& view) const {
    return pixels && view.src.column == 1 && view.step_w == 1 && phases_w_ == 1;
  }
  void fill_pairs(const ConvView& view, const BFloat16* src, int64_t block, int64_t i0,
                  float* scratch) const;

 private:
  // Along pixels, from channels that are neighbours in memory.
  template <typename T>
  void fill_transposed(const ConvView& view, const T* src, int64_t i0, Wide<T>* scratch) const;
  // Along pixels that are neighbours, of a small step.
  template <typename T>
  void fill_split(const ConvView& view, const T* src, int64_t i0, Wide<T>* scratch) const;
  template <typename T>
  void clear_slack(Wide<T>* scratch) const;

  int64_t first_h_, phases_h_, phases_w_, rows_;
  int64_t next_band_;                  // in memory, where pixels are neighbours
  int64_t plane_;                      // of one phase: its rows and what the last one may overrun
  std::vector<Range> ranges_;          // [phase_w]: positions inside the image
  std::vector<int64_t> first_column_;  // [phase_w]: source offset of position 0
  std::vector<int64_t> lane_source_;   // of each output channel, from the sample
};

// dst[i] = src[i*step].
template <typename T>
TORCHCONV_INLINE void copy_strided(Wide<T>* dst, const T* src, int64_t n, int64_t step) {
  if (step == 1) return copy_wide(dst, src, n);
  for (int64_t i = 0; i < n; ++i) dst[i] = to_wide(src[i * step]);
}

}  // namespace torchconv::cpu
