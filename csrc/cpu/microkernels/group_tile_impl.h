// The bodies of group_tile.h, instantiated once for each type in a file of its own. They are fully
// unrolled for the distances between outputs and the taps of a run that networks have; a run of one
// tap serves the others.
#pragma once

#include "cpu/microkernels/group_tile.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Channel `c` (kOneGroup) or lanes[l] (else) of the pixel at src.
template <bool kOneGroup, typename A>
TORCHCONV_INLINE typename Vec<A>::Type group_lanes(const A* src, int64_t c,
                                                   typename Vec<LaneIndex<A>>::Type lanes) {
  if constexpr (kOneGroup)
    return Vec<A>::broadcast(src[c]);
  else
    return permute(Vec<A>::load(src), lanes);
}

template <bool kOneGroup, typename A>
TORCHCONV_INLINE typename Vec<LaneIndex<A>>::Type first_lanes(const LaneIndex<A>* lanes) {
  if constexpr (kOneGroup)
    return typename Vec<LaneIndex<A>>::Type{};
  else
    return Vec<LaneIndex<A>>::load(lanes);
}

// A term of group_sum is one channel.
template <typename T>
struct LaneProduct {
  using Element = T;
  using Register = typename Vec<T>::Type;
  static constexpr bool kRounds = false;
  static TORCHCONV_INLINE void add(Register& sum, Register x, Register filters) {
    sum += filters * x;
  }
};

// kStep 0: any.
template <typename Product, bool kOneGroup, int kTaps, int kStep, int kTile>
void group_sum(const GroupSum<typename Product::Element>& g) {
  using A = typename Product::Element;
  using V = Vec<A>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  static_assert(kStep > 0 || kTaps == 1, "a run shares pixels where the step is known");
  Register sum[kTile];
  if (g.start != nullptr) {
    const Register start = V::load(g.start);
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) sum[j] = start;
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) sum[j] = V::load(g.sums + j * kL);
  }
  if (!g.stream) {
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      if (Product::kRounds && g.rounded != nullptr)
        __builtin_prefetch(g.rounded + j * g.out_step, 1, 3);
      else
        __builtin_prefetch(g.out + j * g.out_step, 1, 3);
    }
  }
  const int64_t step = g.step * kL;
  const A* w = g.weights;
  const char* next = g.next;
  int64_t next_lines = g.next_lines;
  const auto lanes = first_lanes<kOneGroup, A>(g.lanes);
  for (int64_t r = 0; r < g.count_runs; ++r) {
    const A* const src = g.src + g.runs[r].offset;
    const int64_t channels = g.runs[r].channels;
    auto from = lanes;
    for (int64_t c = 0; c < channels; ++c, from += 1, w += kTaps * kL) {
      if (next_lines > 0) {
#pragma GCC unroll 2
        for (int64_t l = 0; l < kNextLines; ++l, next += g.next_step)
          __builtin_prefetch(next, 0, 2);
        next_lines -= kNextLines;
      }
      Register weight[kTaps];
#pragma GCC unroll 4
      for (int s = 0; s < kTaps; ++s) weight[s] = V::load(w + s * kL);
      if constexpr (kStep == 0) {
        const A* pixel = src;
#pragma GCC unroll 16
        for (int j = 0; j < kTile; ++j, pixel += step)
          Product::add(sum[j], group_lanes<kOneGroup>(pixel, c, from), weight[0]);
      } else {
        constexpr int kPixels = (kTile - 1) * kStep + kTaps;
#pragma GCC unroll 32
        for (int u = 0; u < kPixels; ++u) {
          if (kTaps < kStep && u % kStep >= kTaps) continue;
          const Register x = group_lanes<kOneGroup>(src + u * kL, c, from);
#pragma GCC unroll 4
          for (int s = 0; s < kTaps; ++s)
            if (u >= s && (u - s) % kStep == 0 && (u - s) / kStep < kTile)
              Product::add(sum[(u - s) / kStep], x, weight[s]);
        }
      }
    }
  }
  if (g.clamp) {
    const Register low = V::broadcast(g.low), high = V::broadcast(g.high);
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) {
      sum[j] = sum[j] < low ? low : sum[j];
      sum[j] = sum[j] > high ? high : sum[j];
    }
  }
  if constexpr (Product::kRounds) {
    if (g.rounded != nullptr) {
      BFloat16* to = g.rounded;
#pragma GCC unroll 16
      for (int j = 0; j < kTile; ++j, to += g.out_step) {
        const Register row[] = {sum[j]};
        if (j < g.count) Product::store(to, row, g.used);
      }
      return;
    }
  }
  A* out = g.out;
  if (g.used == kL) {
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j, out += g.out_step)
      if (j < g.count) WideVec<A>::store(out, sum[j], g.stream);
  } else {
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j, out += g.out_step)
      if (j < g.count) V::store_partial(out, sum[j], g.used);
  }
}

template <typename Product, bool kOneGroup, int kTaps, int kStep>
GroupSumKernel<typename Product::Element> find_group_sum(int64_t tile) {
  if constexpr (kSumTileCount == 3)
    if (tile == 2) return group_sum<Product, kOneGroup, kTaps, kStep, kSumTiles[kSumTileCount - 1]>;
  return tile == 0 ? group_sum<Product, kOneGroup, kTaps, kStep, kSumTiles[0]>
                   : group_sum<Product, kOneGroup, kTaps, kStep, kSumTiles[1]>;
}

template <typename Product, bool kOneGroup>
GroupSumKernel<typename Product::Element> find_group_sum(int64_t taps, int64_t step, int64_t tile) {
  if (taps == 1) return find_group_sum<Product, kOneGroup, 1, 0>(tile);
  if (taps == 2) return find_group_sum<Product, kOneGroup, 2, 1>(tile);
  return step == 1 ? find_group_sum<Product, kOneGroup, 3, 1>(tile)
                   : find_group_sum<Product, kOneGroup, 3, 2>(tile);
}

template <typename A>
GroupSumKernel<A> group_sum_kernel(int64_t taps, int64_t step, bool one_group, int64_t tile) {
  if constexpr (kPermutesLanes<A>)
    if (!one_group) return find_group_sum<LaneProduct<A>, false>(taps, step, tile);
  return find_group_sum<LaneProduct<A>, true>(taps, step, tile);
}

// Adds kTile outputs at dz to sums[channel][tap].
template <typename A, bool kOneGroup, int kTaps, int kStep, int kTile>
TORCHCONV_INLINE void dot_tile(const A* dz, const A* src, int64_t step, int64_t channel,
                               const typename Vec<LaneIndex<A>>::Type (&lanes)[kDotChannels],
                               typename Vec<A>::Type (&sum)[kDotChannels][kTaps]) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes;
  typename V::Type gradient[kTile];
#pragma GCC unroll 16
  for (int j = 0; j < kTile; ++j) gradient[j] = V::load(dz + j * kL);
  constexpr int kDistance = kStep > 0 ? kStep : 1;
  constexpr int kPixels = (kTile - 1) * kDistance + kTaps;
#pragma GCC unroll 32
  for (int u = 0; u < kPixels; ++u) {
    const A* const pixel = kStep > 0 ? src + u * kL : src + u * step;
#pragma GCC unroll 4
    for (int c = 0; c < kDotChannels; ++c) {
      const auto x = group_lanes<kOneGroup>(pixel, channel + c, lanes[c]);
#pragma GCC unroll 4
      for (int s = 0; s < kTaps; ++s)
        if (u >= s && (u - s) % kDistance == 0 && (u - s) / kDistance < kTile)
          sum[c][s] += gradient[(u - s) / kDistance] * x;
    }
  }
}

template <typename A, bool kOneGroup, int kTaps, int kStep>
void group_dot_run(const GroupDot<A>& d) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes;
  typename V::Type sum[kDotChannels][kTaps];
  typename Vec<LaneIndex<A>>::Type lanes[kDotChannels];
#pragma GCC unroll 4
  for (int c = 0; c < kDotChannels; ++c) {
    lanes[c] = first_lanes<kOneGroup, A>(d.lanes) + static_cast<LaneIndex<A>>(d.first_channel + c);
#pragma GCC unroll 4
    for (int s = 0; s < kTaps; ++s) sum[c][s] = typename V::Type{};
  }
  const int64_t step = d.step * kL;
  const char* next = d.next;
  int64_t next_lines = d.next_lines;
  for (int64_t row = 0; row < d.rows; ++row) {
    const A* dz = d.dz + row * d.dz_row;
    const A* src = d.src + row * d.src_row;
    int64_t j = 0;
    for (; j + kDotTile <= d.count; j += kDotTile, dz += kDotTile * kL, src += kDotTile * step) {
      if (next_lines > 0) {
#pragma GCC unroll 3
        for (int64_t l = 0; l < kNextDotLines; ++l, next += d.next_step)
          __builtin_prefetch(next, 0, 2);
        next_lines -= kNextDotLines;
      }
      dot_tile<A, kOneGroup, kTaps, kStep, kDotTile>(dz, src, step, d.first_channel, lanes, sum);
    }
    for (; j < d.count; ++j, dz += kL, src += step)
      dot_tile<A, kOneGroup, kTaps, kStep, 1>(dz, src, step, d.first_channel, lanes, sum);
  }
#pragma GCC unroll 4
  for (int c = 0; c < kDotChannels; ++c) {
#pragma GCC unroll 4
    for (int s = 0; s < kTaps; ++s) {
      if (c >= d.channels) continue;
      A* to = d.sums + (c * kTaps + s) * kL;
      V::store(to, V::load(to) + sum[c][s]);
    }
  }
}

template <typename A, bool kOneGroup>
void group_dot_runs(const GroupDot<A>& d, int64_t taps) {
  if (taps == 1) return group_dot_run<A, kOneGroup, 1, 0>(d);
  if (taps == 2) return group_dot_run<A, kOneGroup, 2, 1>(d);
  if (d.step == 1) return group_dot_run<A, kOneGroup, 3, 1>(d);
  return group_dot_run<A, kOneGroup, 3, 2>(d);
}

template <typename A>
void group_dot(const GroupDot<A>& d, int64_t taps) {
  if constexpr (kPermutesLanes<A>)
    if (d.lanes != nullptr) return group_dot_runs<A, false>(d, taps);
  group_dot_runs<A, true>(d, taps);
}

}  // namespace torchconv::cpu
