// Pairs of neighbouring bfloat16 channels, the terms of a product that computes two multiplications
// in 32 bits (avx512_bf16): [pixel or tap][pair][2], the first channel in the lower half. A last
// odd channel is paired with zero. Arrays of pairs are arrays of float whose values are never
// looked at.
#pragma once

#include <cstdint>

#include "cpu/channel_band.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// Whether the products of a bfloat16 view are those of pairs.
inline bool takes_pairs(const ConvView& view) { return view.groups == 1 && has_pair_products(); }

// The view with a pair for a channel; strides are still those of elements.
inline ConvView pair_view(const ConvView& view) {
  ConvView pairs = view;
  pairs.C = ceil_div(view.C, int64_t{2});
  return pairs;
}

// Pairs of the upper halves of two vectors of floats, at p and q or zero.
TORCHCONV_INLINE void join_pairs(const float* p, const float* q, float* to) {
  using Bits = Vec<uint32_t>;
  const Bits::Type odd = q != nullptr ? Bits::load(q) & 0xffff0000u : Bits::Type{};
  Bits::store(to, Bits::load(p) >> 16 | odd);
}

// As ChannelBand::fill, of `channels` channels in pairs, in either layout: src is the first one's
// pixel (0, 0).
void fill_pairs(const ChannelBand& band, const ConvView& view, const BFloat16* src,
                int64_t channels, Range i, Range j, float* scratch);

}  // namespace torchconv::cpu
