// The kernels behind the depthwise_* functions of conv_passes.h; depthwise.cu chooses.
#pragma once

#include <algorithm>

#include "cuda/gather.h"

namespace torchconv::cuda {

// How many of a pixel's vectors a block of `threads` threads takes side by side: whole sectors, and
// few idle threads.
inline int64_t lanes_of_block(int64_t vectors, int64_t threads) {
  int64_t lanes = 1, least = 0;
  for (int64_t each = std::min<int64_t>(32, threads / 4 * 4); each >= 4; each -= 4) {
    // Threads there are for every one that has work.
    const int64_t cost = ceil_div(vectors, each) * 1000 * threads / (threads / each);
    if (least == 0 || cost < least) lanes = each, least = cost;
  }
  return std::min(lanes, vectors);
}

// Bit i: whether first + i * step lies in [0, size), for kCount places.
template <int kCount, bool kSteps>
__device__ __forceinline__ uint32_t inside_bits(int first, int step, int size) {
  if constexpr (kSteps) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (static_cast<unsigned>(first + i * step) < static_cast<unsigned>(size)) bits |= 1u << i;
    return bits;
  }
  const auto below = [](int end) {
    return end <= 0 ? 0u : end >= kCount ? (1u << kCount) - 1 : (1u << end) - 1;
  };
  return below(size - first) & ~below(-first);
}

// Whether 32 bits count the elements between the columns of a window, with channels contiguous.
inline bool window_fits(const Gather& g) {
  return static_cast<int64_t>(g.groups) * g.w.unit.value() < (int64_t{1} << 26);
}

// How many tiles a thread goes through, of `positions` tiles for `subs` threads of a block: long
// runs, but waves of blocks that fill a large device, which holds `held`. A block costs about
// `overhead` tiles on top.
inline int64_t rounds_of_block(int64_t lane_tiles, int64_t positions, int64_t subs, int64_t most,
                               int64_t held, int64_t overhead) {
  int64_t rounds = 1, least = 0;
  for (int64_t each = 1; each <= most; ++each) {
    const int64_t blocks = lane_tiles * ceil_div(positions, subs * each);
    const int64_t waves = ceil_div(blocks, held), cost = waves * (each + overhead);
    if (each == 1 || cost <= least) rounds = each, least = cost;
    if (waves <= 1) break;
  }
  return rounds;
}

// fprop and dgrad by small square kernels, pixels contiguous; any number of filters a channel.
void depthwise_planes(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue);

// The same of fprop, and of dgrad of stride 1, for one filter a channel and types of at most four
// bytes. False, and nothing done, where it does not take them.
bool depthwise_strips(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue);

// The same with channels contiguous. False, and nothing done, where channels or pointers are no
// multiples of 16 bytes or a channel has several filters.
bool depthwise_channels(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                        const void* w, const void* bias, void* out, void* preactivation,
                        Activation activation, const Queue& queue);

// The same of fprop, and of dgrad of stride 1, for half types and float32 up to 5x5, aligned
// vectors of one or two channels, and activations of a comparison alone. False, and nothing done,
// where it does not take them.
bool depthwise_channel_strips(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* in, const void* w, const void* bias, void* out,
                              Activation activation, const Queue& queue);

// The same of stride 1 on tensor cores, sm_80 and later. False, and nothing done, where channels or
// pointers are no multiples of 16 bytes, a channel has several filters, or the activation is more
// than a comparison.
bool depthwise_channel_mma(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                           const void* in, const void* w, const void* bias, void* out,
                           Activation activation, const Queue& queue);

// Both gradients at once, of which one may be null, with channels contiguous, by 3x3 kernels of
// stride 1, of float32 5x5 too; g is dgrad's. False, and nothing done, where it does not take them.
bool depthwise_channel_gradients(DType dtype, int64_t R, const Gather& g, const void* dz,
                                 const void* x, const void* w, void* dx, void* dw,
                                 const Queue& queue);

// fprop and dgrad of any kernel, stride and layout, and what takes a residual.
void depthwise_taps(const ConvProblem& p, Pass pass, const void* in, const void* w,
                    const void* bias, const void* residual, void* out, void* preactivation,
                    const Queue& queue);

// wgrad by the same kernels; sampling and g are fprop's.
void depthwise_planes_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                            const void* dz, const void* x, void* dw, const Queue& queue);
bool depthwise_strips_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                            const void* dz, const void* x, void* dw, const Queue& queue);
bool depthwise_channels_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* dz, const void* x, void* dw, const Queue& queue);
bool depthwise_channel_strips_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                                    const void* dz, const void* x, void* dw, const Queue& queue);
bool depthwise_mma_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* dz,
                         const void* x, void* dw, const Queue& queue);
void depthwise_taps_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                          const Queue& queue);

}  // namespace torchconv::cuda
