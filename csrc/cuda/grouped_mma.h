// Grouped convolution on tensor cores for 16-bit types in NHWC, with as many filters as channels a
// group: 1, 2, 4 or a multiple of 8 up to 64, of which fprop and dgrad have those up to 24 (wider
// ones are mma_gather.h's). grouped_mma.cu prepares the problems.
//
// Channels come in units of 8, which are 16 bytes. Groups of 8 or more are whole units; narrower
// ones share one, with zeros for the weights between them. A reduction runs over halves, (tap,
// unit) pairs of 8 terms, two of which make one mma of 16: so groups of 8 waste nothing but the
// half that an odd number of taps leaves. A block has a slab of up to 8 units, 128 bytes of each
// pixel, and passes over tiles of pixels, of which it stages the next one with its surroundings
// while it computes on one. Pixels are taken in octets, eight neighbours in a row; of a stride, the
// columns of each residue lie together, so that they are neighbours in shared memory too.
//
// Bound: reading the image and writing the output once.
#pragma once

#include "cuda/activation.h"
#include "cuda/mma_gather.h"

namespace torchconv::cuda {

inline constexpr int kUnitBytes = 16, kUnitChannels = 8, kSlabUnits = 8;
inline constexpr int kMostGathered = 24;  // channels of a group forward and of dx
// Of a staged pixel: the same unit of 8 neighbours meets all banks.
inline constexpr int kPixelBytes = kSlabUnits * kUnitBytes + 16;

// A tile of outputs: images x rows x octets.
struct OctetTile {
  int32_t images, rows, octets;
};

// What both directions and the weights' gradient have of the channels.
struct GroupedChannels {
  int32_t channels, group;                 // all, and of one group
  int32_t slabs, slab_units, group_units;  // units: at least 1 a group
};

// The forward pass, or with `backward` the gradient by the image: see mma_gather.h for the axes.
struct GroupedGather {
  const void* image;
  const void* filters;                    // a group's are group * taps * group apart
  int64_t filter_output, filter_channel;  // elements from one to the next, in a group
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  bool backward;
  OctetTile tile;
  int32_t parts;         // of the tiles of a phase
  int32_t buffer_bytes;  // a staged tile, and one pixel of zeros
  int32_t steps;         // of 16 terms, in the phase that has most
  Divisor scale_w;       // by what neighbouring outputs are apart
};

template <typename T>
void run_grouped_gather(GroupedGather p, const Epilogue<T>& epilogue, const Queue& queue);
extern template void run_grouped_gather(GroupedGather, const Epilogue<Half>&, const Queue&);
extern template void run_grouped_gather(GroupedGather, const Epilogue<BFloat16>&, const Queue&);

// Tensors' sizes that both kernels of a pass need.
struct GroupedWgrad {
  const void* dz;
  const void* x;
  float* sums;  // parts x slabs x jobs x a warp's sums
  void* dw;
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  OctetTile tile;
  int32_t parts, jobs, chunks;  // jobs of a slab, a warp each; of them for each tile of filters
  int32_t halo_bytes;
  Divisor scale_w;
};

template <typename T>
void run_grouped_wgrad(GroupedWgrad p, const Queue& queue);
extern template void run_grouped_wgrad<Half>(GroupedWgrad, const Queue&);
extern template void run_grouped_wgrad<BFloat16>(GroupedWgrad, const Queue&);

}  // namespace torchconv::cuda
