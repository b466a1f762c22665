// Pairs of bfloat16 where channels are few and odd, as in a first layer: a pair holds no channel
// beside a zero then, but the pixels that a row of the kernel covers are one run of channels,
//
//   [tap of the row][channel]
//
// of which the last alone may be paired with zero: 11 pairs for 7 pixels of 3 channels, not 14. The
// row is the only tap of a view whose pixels are such runs, copied to a band one for each output.
// Where the runs of all rows of the kernel fit a vector they are one, 14 pairs for 3 rows of 3
// pixels of 3 channels, not 15: the image's patch under the kernel (im2col).
#pragma once

#include "cpu/channel_band.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether the products of a bfloat16 view are those. Its taps are whole rows of neighbours.
bool takes_row_pairs(const ConvView& view);

// The view with its taps in the order of the pixels they read, which dgrad's are against. The
// functions below take it.
ConvView row_image(const ConvView& view);

// The view of runs, and the weights in its order.
ConvView row_view(const ConvView& image);
void pack_row_weights(const ConvView& image, const BFloat16* w, BFloat16* rows);

// As fill_pairs of channel_pairs.h, of the runs of an image (takes_row_pairs). view: pairs of its
// row_view.
void fill_row_pairs(const ConvView& image, const ChannelBand& band, const ConvView& view,
                    const BFloat16* src, int64_t channels, Range i, Range j, float* scratch);

}  // namespace torchconv::cpu
