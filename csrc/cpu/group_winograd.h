// 3x3 convolution of step 1 with few channels in a group by Winograd's F(4,3) along the rows and
// F(2,3) along the columns: a third of the multiplications.
#pragma once

#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"
#include "cpu/group_band.h"
#include "cpu/microkernels/group_winograd.h"

namespace torchconv::cpu {

// Whether the view is one that group_winograd_gather computes, where group_band_applies
// (group_gather.h).
bool group_winograd_applies(const ConvView& view);
// The part of the multiplications that is left.
double group_winograd_products(const ConvView& view);

// The same for group_winograd_wgrad (group_wgrad.h).
double group_winograd_wgrad_products(const ConvView& view);
// The blocks and bands, which have columns for whole tiles, and `unit` rows of outputs.
GroupBand group_winograd_band(const ConvView& view, int64_t unit = 1);
// Rows of pixels of one vector each, from the first tap of a tile's first output on.
struct GroupPixels {
  const float* src;
  int64_t row, column;
  int64_t begin, end;  // of the rows in the image; the others are zeros
  int64_t ahead;       // from a pixel to one that will be read later, or 0
};
// A part of an image in channels_last: in place where it is inside and vectors are whole, else
// copied with zeros around it.
GroupPixels group_pixels(const GroupWindow& window, const float* src, float* copy);

// Elements of the packed weights. They depend on what group_weights_size (group_gather.h) does.
int64_t group_winograd_weights_size(const ConvView& view);
void group_winograd_pack_weights(const ConvView& view, const float* w, float* packed,
                                 const Parallel& pool);

// The gather of one view. packed: from group_winograd_pack_weights, or null; bias may be null.
// Returns the samples that hold an infinity, a NaN or an overflow, as winograd_gather does.
std::vector<int64_t> group_winograd_gather(const ConvView& view, const float* src, const float* w,
                                           const float* packed, const float* bias,
                                           const Epilogue<float>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
