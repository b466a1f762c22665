// How direct_gemm cuts a view: into blocks of outputs and chunks of channels, and whether a block's
// pixels are copied to a band or read where they lie.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/channel_band.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// How a view is cut: from one sample's shape, but for `samples`, which changes no sum.
struct DirectPlan {
  // in_place_possible: the image is in the computing type. pixel: from one to the next, in terms.
  DirectPlan(const ConvView& view, int64_t element_size, bool in_place_possible, int64_t pixel);

  int64_t channels, chunks;         // of the reduction
  int64_t rows, columns;            // outputs in a block
  int64_t samples;                  // blocks of that many samples, where a block is a whole one
  int64_t nominal_samples;          // the same in an endless batch
  std::optional<ChannelBand> band;  // or the image itself is read
  bool reads_neighbours;            // there: one pixel after the other
  bool reads_taps;                  // there: through several taps
  int64_t tile_rows = kMaxRows;     // at most
  int64_t padded_filters;

  // Whether so few blocks of so few pixels meet the weights that each task packs its own, a panel
  // at a time, which no other thread then has to read.
  bool packs_along(const ConvView& view, int64_t element_size) const;

  int64_t chunk_channels(const ConvView& view, int64_t chunk) const {
    return std::min(channels, view.C - chunk * channels);
  }
};

// Pixels of a batch for which weights are packed twice at most.
inline constexpr int64_t kPixelsPackedAlong = 448;
// From so many pixels on, what each of two threads packs for half of them is little.
inline constexpr int64_t kPixelsForTwo = 196;
// Whether the pixels of a call on one image are cut for two threads though one block could take
// them: there are few panels of filters, and an odd number of them, or two for many pixels.
bool direct_plan_cuts_pixels(const ConvView& view, int64_t element_size);

}  // namespace torchconv::cpu
