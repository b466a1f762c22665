// What a term of direct_gemm's product is: how a band of the image is filled with terms, and which
// register tile multiplies them.
#pragma once

#include "cpu/channel_band.h"
#include "cpu/channel_pairs.h"
#include "cpu/microkernels/direct_tile.h"

namespace torchconv::cpu {

// A channel, in the computing type.
struct ChannelTerms {
  static constexpr int64_t kChannels = 1;
  template <typename A>
  static DirectMicrokernel<A> kernel(int64_t rows, int64_t vectors) {
    return direct_microkernel<A>(rows, vectors);
  }
  // Of the image, to which so many channels of a pixel belong.
  int64_t planes(int64_t channels) const { return channels; }
  template <typename T>
  void fill(const ChannelBand& band, const ConvView& view, const T* src, int64_t channels, Range i,
            Range j, Wide<T>* scratch) const {
    band.fill(view, src, channels, i, j, scratch);
  }
};

// Or a pair of them, see channel_pairs.h; row_pairs.h has a third kind.
struct PairTerms {
  static constexpr int64_t kChannels = 2;
  template <typename A>
  static DirectMicrokernel<float> kernel(int64_t rows, int64_t vectors) {
    return direct_pair_microkernel(rows, vectors);
  }
  int64_t planes(int64_t channels) const { return channels; }
  void fill(const ChannelBand& band, const ConvView& view, const BFloat16* src, int64_t channels,
            Range i, Range j, float* scratch) const {
    fill_pairs(band, view, src, channels, i, j, scratch);
  }
};

}  // namespace torchconv::cpu
