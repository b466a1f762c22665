// Depthwise kernels with channels contiguous (NHWC), half types: what the gather and the weight
// gradient share.
//
// A thread has kVector channels of a strip of kColumns neighbouring outputs and rolls it down over
// the rows of its set, so that every loaded element serves all taps from registers; the next rows
// are under way meanwhile. Few channels a thread leave room for the weights, or their sums, of all
// taps. Lanes lie along the channels, and the subs of a block along strips, sets and images.
#pragma once

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
  static constexpr int R = R_, kTaps = R * R, kVector = kVector_;
  static constexpr int kColumns = kColumns_, kStride = kStride_;
  static constexpr int kWindow = (kColumns - 1) * kStride + R;
  static constexpr int kThreads = 128;
  // Rows of a window whose code stands side by side, so that no number moves to another register.
  static constexpr int kSlots = (R + kStride - 1) / kStride;  // outputs that a row meets
  static constexpr int kUnroll = R == 7 ? 1 : kStride * kSlots;
  // Rows under way: where there is little to compute for each, one would not hide its latency.
  static constexpr int kDepth = R == 3 ? (kStride == 1 ? 3 : 2) : 1;
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

// About how many cycles a large device takes for blocks that go through `steps` rows each, of which
// a multiprocessor holds `resident`: either instructions or the latency of loads take the time.
template <typename S>
int64_t duration(int64_t blocks, int64_t steps, int64_t resident) {
  constexpr int64_t kLatency = 900 / S::kDepth;
  constexpr int64_t kIssue = (S::kTaps * 4 / 3 + 6) * S::kColumns * S::kVector;
  const int64_t each = ceil_div(blocks, 132), held = std::min(each, resident);
  return steps * std::max(kLatency, held * kIssue) * each / held;
}

}  // namespace torchconv::cuda
