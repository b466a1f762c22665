// Convolution of channels_last images as a matrix product that reads pixels where they lie.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/channel_band.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether direct_gemm computes the view: channels are neighbours in both images.
inline bool direct_gemm_applies(const ConvView& view) {
  return view.src.c == 1 && view.dst.c == 1;
}

// How a view is cut, and the layout of its packed weights: from one sample's shape, but for
// `samples`, which changes no sum.
struct DirectPlan {
  // in_place_possible: the image is in the computing type.
  DirectPlan(const ConvView& view, int64_t element_size, bool in_place_possible);

  int64_t channels, chunks;  // of the reduction: all taps of so many channels
  int64_t rows, columns;     // outputs in a block
  int64_t samples;           // blocks of that many samples, where a block is a whole one
  int64_t nominal_samples;   // the same in an endless batch
  std::optional<ChannelBand> band;  // or the image itself is read
  bool reads_neighbours;            // there: one pixel after the other
  int64_t padded_filters;

  int64_t chunk_channels(const ConvView& view, int64_t chunk) const {
    return std::min(channels, view.C - chunk * channels);
  }
};

// Elements of the packed weights of all groups: [group][chunk][panel][tap][channel][filter].
int64_t direct_weights_size(const ConvView& view, const DirectPlan& plan);

template <typename T>
void direct_pack_weights(const ConvView& view, const DirectPlan& plan, const T* w, Wide<T>* packed,
                         const Parallel& pool);

// The grid must not be empty; the terms may be. bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void direct_gemm(const ConvView& view, const DirectPlan& plan, const T* src, const Wide<T>* packed,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
