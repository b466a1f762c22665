// Depthwise kernels with channels contiguous (NHWC): what the gather, the weight gradient and both
// gradients at once share.
//
// A thread has kVector channels of a strip of kColumns neighbouring outputs and rolls it down over
// the rows of its set, so that every loaded element serves all taps from registers; the next rows
// are under way meanwhile. Few channels a thread leave room for the weights, or their sums, of all
// taps. Lanes lie along the channels, and the subs of a block along strips, sets and images.
#pragma once

#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"
#include "cuda/packed.h"

namespace torchconv::cuda {

struct ChannelStrips {
  Gather g;
  int channels, vectors;      // of a pixel
  Divisor lanes, lane_tiles;  // vectors of a block; blocks along a pixel's channels
  Divisor strips, sets;       // of a row; of an image
  int subs, set_rows;
  uint32_t positions;  // strips of all sets and images
};

template <typename T_, int R_, int kColumns_, int kVector_, int kStride_ = 1>
struct ChannelStrip {
  using T = T_;
  using A = Wide<T>;
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int R = R_, kTaps = R * R, kVector = kVector_;
  static constexpr int kColumns = kColumns_, kStride = kStride_;
  static constexpr int kWindow = (kColumns - 1) * kStride + R;
  static constexpr int kThreads = 128;
  // Of the weights in shared memory, between taps: a channel's taps lie in several banks.
  static constexpr int kPitch = 33 * kVector;
  // Rows of a window whose code stands side by side, so that no number moves to another register.
  static constexpr int kSlots = (R + kStride - 1) / kStride;  // outputs that a row meets
  static constexpr int kUnroll = R == 7 ? 1 : kStride * kSlots;
  // Rows under way: where there is little to compute for each, one would not hide its latency.
  static constexpr int kOfStride2 = R == 3 && kNarrow ? 4 : R == 3 || !kNarrow ? 2 : 1;
  static constexpr int kDepth = kStride == 2 ? kOfStride2 : R == 3 ? 3 : 1;
  static_assert(kUnroll % kDepth == 0);
  using Loaded = Packed<T, kVector>;

  // kCount neighbouring pixels, zeros where their bit is not set.
  template <int kCount>
  static __device__ __forceinline__ void load(const T* line, int channels, uint32_t bits,
                                              Loaded (&row)[kCount]) {
    const uint32_t step = static_cast<uint32_t>(channels) * static_cast<uint32_t>(sizeof(T));
    const char* at = reinterpret_cast<const char*>(line);
#pragma unroll
    for (int i = 0; i < kCount; ++i, at += step)
      row[i] = (bits >> i & 1) != 0 ? *reinterpret_cast<const Loaded*>(at) : Loaded{};
  }
  template <int kCount>
  static __device__ __forceinline__ void widen(const Loaded (&row)[kCount],
                                               A (&value)[kCount][kVector]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
#pragma unroll
      for (int v = 0; v < kVector; ++v) value[i][v] = row[i].wide(v);
  }
};

// Where strip number `position` begins: its first output.
struct StripPlace {
  int n, row, column;

  __device__ __forceinline__ StripPlace(const ChannelStrips& p, uint32_t position, int columns) {
    column = static_cast<int>(p.strips.split(position)) * columns;
    row = static_cast<int>(p.sets.split(position)) * p.set_rows;
    n = static_cast<int>(position);
  }
};

// The weights of the block's channels from w, to [taps][kPitch] in shared memory.
template <typename S>
__device__ __forceinline__ void stage_weights(const ChannelStrips& p, int vector0,
                                              const typename S::T* w, typename S::A* weights) {
  const int lanes = static_cast<int>(p.lanes.value());
  const int count = min(lanes, p.vectors - vector0) * S::kVector * S::kTaps;
  const auto* block_weights = w + static_cast<int64_t>(vector0) * S::kVector * S::kTaps;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count; i += S::kThreads) {
    const int tap = i % S::kTaps;
    weights[(p.g.turned ? S::kTaps - 1 - tap : tap) * S::kPitch + i / S::kTaps] =
        to_wide(block_weights[i]);
  }
}

// The threads' sums z of their channels' taps, added over the subs of the block in `shared`, which
// nobody uses any more.
template <typename S>
__device__ __forceinline__ void store_block_sums(const ChannelStrips& p, int vector0,
                                                 uint32_t slice,
                                                 const typename S::A (&z)[S::kTaps][S::kVector],
                                                 typename S::A* shared,
                                                 const SliceSums<typename S::T>& sums) {
  using A = typename S::A;
  constexpr int kTaps = S::kTaps, kVector = S::kVector;
  constexpr int kPitch = S::kThreads * kVector;  // [kTaps][threads][kVector]
#pragma unroll
  for (int i = 0; i < kTaps; ++i)
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      shared[i * kPitch + static_cast<int>(threadIdx.x) * kVector + v] = z[i][v];
  __syncthreads();
  const int width = static_cast<int>(p.lanes.value()) * kVector;
  const int channels = min(width, p.channels - vector0 * kVector);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width * kTaps; i += S::kThreads) {
    const int of = i % width, tap = i / width;
    if (of >= channels) continue;
    A total{0};
#pragma unroll 4
    for (int share = 0; share < p.subs; ++share) total += shared[tap * kPitch + share * width + of];
    sums.store(slice,
               (static_cast<int64_t>(vector0) * kVector + of) * kTaps +
                   (p.g.turned ? kTaps - 1 - tap : tap),
               total);
  }
}

// Whether strips can compute g: one filter a channel, aligned vectors.
template <typename S>
bool channel_strips_take(const Gather& g, const void* in, const void* out) {
  return g.in_channels == 1 && g.out_channels == 1 && g.groups % S::kVector == 0 && g.h.out > 0 &&
         g.w.out > 0 && g.N > 0 && aligned<typename S::T>(in, S::kVector) &&
         aligned<typename S::T>(out, S::kVector);
}

// Strips of sets of `rows` rows.
template <typename S>
ChannelStrips channel_strips(const Gather& g, int64_t rows) {
  ChannelStrips p{};
  p.g = g;
  p.channels = g.groups;
  p.vectors = g.groups / S::kVector;
  const int64_t lanes = lanes_of_block(p.vectors, S::kThreads);
  const int64_t strips = ceil_div(g.w.out, S::kColumns), sets = ceil_div(g.h.out, rows);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(ceil_div(p.vectors, lanes));
  p.strips = Divisor(strips), p.sets = Divisor(sets);
  p.subs = static_cast<int>(S::kThreads / lanes), p.set_rows = static_cast<int>(rows);
  p.positions = static_cast<uint32_t>(g.N * strips * sets);
  return p;
}

// Cycles that a row of a block takes at least, with those that are under way. Fitted to an H200.
inline constexpr int64_t kRowLatency = 800;

// About how many cycles a large device takes for blocks that go through `steps` rows each, of which
// a multiprocessor holds `resident`: either instructions or the latency of loads take the time.
template <typename S>
int64_t duration(int64_t blocks, int64_t steps, int64_t resident) {
  constexpr int64_t kIssue = (S::kTaps * 4 / 3 + 6) * S::kColumns * S::kVector;
  const int64_t each = ceil_div(blocks, 132), held = std::min(each, resident);
  return steps * std::max(kRowLatency, held * kIssue) * each / held;
}

}  // namespace torchconv::cuda
