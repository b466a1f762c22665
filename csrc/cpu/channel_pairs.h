// Pairs of neighbouring bfloat16 channels, the terms of a product that computes two multiplications
// in 32 bits (avx512_bf16): [pixel or tap][pair][2], the first channel in the lower half. A last
// odd channel is paired with zero. Arrays of pairs are arrays of float whose values are never
// looked at.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/channel_band.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// Narrower groups lie side by side in vectors.
inline constexpr int64_t kNarrowGroupFilters = kVectorBytes / 4;

// Whether the matrix products of a bfloat16 view are those of pairs.
inline bool takes_pairs(const ConvView& view) {
  return has_pair_products() && (view.groups == 1 || view.K > kNarrowGroupFilters);
}

// And those of narrow groups, whose pairs must not share channels of two groups.
inline bool groups_take_pairs(const ConvView& view) {
  return has_pair_products() && view.K <= kNarrowGroupFilters && view.C % 2 == 0;
}

// The view with a pair for a channel; strides are still those of elements.
inline ConvView pair_view(const ConvView& view) {
  ConvView pairs = view;
  pairs.C = ceil_div(view.C, int64_t{2});
  return pairs;
}

// Pairs (p[l], q[l]), of whose halves the first lo and hi exist.
TORCHCONV_INLINE Vec<uint32_t>::Type zip_pairs(const BFloat16* p, int64_t lo, const BFloat16* q,
                                               int64_t hi) {
  constexpr int64_t kL = Vec<uint32_t>::kLanes;
  using Halves = Vec<uint16_t, kL>;
  const auto load = [](const BFloat16* from, int64_t n) {
    return convert<uint32_t, uint16_t, kL>(n == kL  ? Halves::load(from)
                                           : n <= 0 ? Halves::Type{}
                                                    : Halves::load_partial(from, n));
  };
  return load(p, lo) | load(q, hi) << 16;
}

template <int... I>
TORCHCONV_INLINE void zip_whole(const BFloat16* p, const BFloat16* q, float* to,
                                std::integer_sequence<int, I...>) {
  using Halves = Vec<uint16_t>;
  constexpr int kL = Halves::kLanes;
  const Halves::Type a = Halves::load(p), b = Halves::load(q);
  Halves::store(to, shuffle<(I / 2 + I % 2 * kL)...>(a, b));
  Halves::store(to + kL / 2, shuffle<(kL / 2 + I / 2 + I % 2 * kL)...>(a, b));
}
// to[l] = (p[l], q[l]), two vectors of them.
TORCHCONV_INLINE void zip_two_vectors(const BFloat16* p, const BFloat16* q, float* to) {
  zip_whole(p, q, to, std::make_integer_sequence<int, Vec<uint16_t>::kLanes>());
}

// Pairs of the upper halves of two vectors of floats, at p and q or zero.
TORCHCONV_INLINE void join_pairs(const float* p, const float* q, float* to) {
  using Bits = Vec<uint32_t>;
  const Bits::Type odd = q != nullptr ? Bits::load(q) & 0xffff0000u : Bits::Type{};
  Bits::store(to, Bits::load(p) >> 16 | odd);
}

// to[p*pixel + c/2] for pixels p < count, `step` apart, and channels c < channels, `plane` apart
// or, in copy_pairs, neighbours. Of every `width` pixels the first `kept` are, and there are `gap`
// more elements of `to` after them.
void transpose_pairs(const BFloat16* src, int64_t plane, int64_t step, int64_t count,
                     int64_t channels, float* to, int64_t pixel, int64_t width = INT64_MAX,
                     int64_t kept = INT64_MAX, int64_t gap = 0);
void copy_pairs(const BFloat16* src, int64_t step, int64_t count, int64_t channels, float* to,
                int64_t pixel);

// As ChannelBand::fill, of `channels` channels in pairs, in either layout: src is the first one's
// pixel (0, 0).
void fill_pairs(const ChannelBand& band, const ConvView& view, const BFloat16* src,
                int64_t channels, Range i, Range j, float* scratch);

}  // namespace torchconv::cpu
