// What the loops of batch normalisation share: how a problem is cut, the constants of channels by
// lanes, and sums in double.
//
// In contiguous layout (planes) a piece of work is a channel with its N planes, whose constants are
// the same in every lane. In channels_last (pixels) it is a block of pixels, with the constants of
// all channels one after the other. The loops differ in how far the constants advance.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "core/buffer.h"
#include "core/range.h"
#include "cpu/batch_norm_channels.h"
#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// `count` runs of `length` elements, one every `pitch`.
struct Runs {
  int64_t count, length, pitch;
};

// How far ahead of a channel's planes to prefetch: those of the next channel, which lie behind
// them, where planes are so short that the hardware would notice their runs too late, and two
// channels with their outputs fit in the second-level cache.
inline int64_t planes_ahead(const BatchNormProblem& p) {
  constexpr int64_t kMostElements = 1 << 15;
  const int64_t plane = p.H * p.W;
  return p.N * plane <= kMostElements ? plane : 0;
}

// Images of one pixel are both layouts; as pixels they fill vectors.
constexpr bool runs_as_pixels(const BatchNormProblem& p) {
  return p.layout == Layout::kNHWC || (p.H == 1 && p.W == 1);
}

// Blocks of pixels: enough pixels that their sums are few beside them, and enough blocks for many
// threads. By the shape alone, because sums are taken by block.
struct PixelBlocks {
  static constexpr int64_t kElements = 1 << 14, kFewest = 16, kMostBlocks = 128;
  int64_t pixels, size, count, channels;

  explicit PixelBlocks(const BatchNormProblem& p)
      : pixels(p.N * p.H * p.W),
        size(std::max({kFewest, kElements / p.C, ceil_div(pixels, kMostBlocks)})),
        count(ceil_div(pixels, size)),
        channels(p.C) {}
  Runs runs(int64_t block) const {
    return {std::min(size, pixels - block * size), channels, channels};
  }
  int64_t offset(int64_t block) const { return block * size * channels; }
};

// Operations (work_grain) for each element in a pass.
inline constexpr double kNormOperations = 4;
// What is done once a channel: sums of all blocks, a root and quotients.
inline int64_t channel_grain(const PixelBlocks& blocks) {
  constexpr double kRootOperations = 2000;
  return work_grain(kRootOperations + kNormOperations * static_cast<double>(blocks.count));
}

// The sums of all blocks, `width` each, from begin to end.
inline void add_blocks(const PixelBlocks& blocks, int64_t width, const double* sums, int64_t begin,
                       int64_t end, double* to) {
  std::fill(to + begin, to + end, 0.0);
  for (int64_t b = 0; b < blocks.count; ++b)
    for (int64_t i = begin; i < end; ++i) to[i] += sums[b * width + i];
}

// Vectors of T in the type that it is computed in, and in double for sums.
template <typename T>
struct NormLanes {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using V = typename W::Type;
  using Lanes = Vec<Lane>;
  using Doubles = Vec<double>;
  static constexpr int kLanes = W::kLanes;
  static constexpr int kParts = kLanes / Doubles::kLanes;

  struct Sum {
    typename Doubles::Type part[kParts];

    static TORCHCONV_INLINE Sum load(const double* from) {
      Sum sum;
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) sum.part[i] = Doubles::load(from + i * Doubles::kLanes);
      return sum;
    }
    TORCHCONV_INLINE void store(double* to) const {
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) Doubles::store(to + i * Doubles::kLanes, part[i]);
    }
  };

  static TORCHCONV_INLINE Sum widen(V v) {
    Sum wide;
    typename Vec<Lane, kLanes / kParts>::Type narrow[kParts];
    std::memcpy(&narrow, &v, sizeof(v));
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i)
      wide.part[i] = convert<double, Lane, kLanes / kParts>(narrow[i]);
    return wide;
  }

  // The first n lanes of v, and of `others` the rest.
  static TORCHCONV_INLINE V first(V v, int64_t n, V others) {
    using Index = std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t>;
    using Indices = Vec<Index>;
    return Indices::iota() < Indices::broadcast(static_cast<Index>(n)) ? v : others;
  }

  template <bool kPartial>
  static TORCHCONV_INLINE V load(const T* p, int64_t n) {
    return kPartial ? W::load_partial(p, n) : W::load(p);
  }
  template <bool kPartial>
  static TORCHCONV_INLINE void store(T* p, V v, int64_t n, bool streams) {
    if constexpr (kPartial) {
      W::store_partial(p, v, n);
    } else {
      W::store(p, v, streams);
    }
  }

  static TORCHCONV_INLINE V broadcast(double x) { return Lanes::broadcast(static_cast<Lane>(x)); }

  // Constants of one channel, in every lane; `rows` of them.
  static void fill(Lane* rows, std::initializer_list<double> values) {
    for (const double value : values) {
      Lanes::store(rows, broadcast(value));
      rows += kLanes;
    }
  }
  // Those of a channel among all, `width` of them in a row.
  static void put(Lane* rows, int64_t width, int64_t channel,
                  std::initializer_list<double> values) {
    for (const double value : values) {
      rows[channel] = static_cast<Lane>(value);
      rows += width;
    }
  }
  static double total(const double* sums) {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += sums[i];
    return sum;
  }
};

// A few pixels at a time: the sums of as many vectors stay in registers, and the pixels in the
// first-level cache, while all channels pass.
inline constexpr int64_t kPixelRows = 16;

// Kernel<T>(arguments...).run(), for the problem's type.
template <template <typename> class Kernel, typename... Arguments>
void run_typed(const BatchNormProblem& p, const Arguments&... arguments) {
  switch (p.dtype) {
    case DType::kFloat64:
      return Kernel<double>(p, arguments...).run();
    case DType::kBFloat16:
      return Kernel<BFloat16>(p, arguments...).run();
    case DType::kFloat16:
      return Kernel<Float16>(p, arguments...).run();
    default:
      return Kernel<float>(p, arguments...).run();
  }
}

}  // namespace torchconv::cpu
