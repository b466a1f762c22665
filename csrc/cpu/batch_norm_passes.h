// The two passes of batch normalisation over memory, forward and backward: the first takes two sums
// of each channel, the second writes by constants that are made of them. The second goes backwards:
// it begins with what was read last.
//
// In contiguous layout (planes) channels go through both passes in groups whose elements stay in
// the second-level cache. In channels_last (pixels) all channels of a block of pixels go through
// the first pass, and when all blocks have, through the second: a strip of channels alone would not
// stay in a cache, because in one set of it meet all pixels where their pitch is a power of two.
// How a problem is cut follows from its shape alone, because sums are taken by block.
#pragma once

#include <atomic>

#include "core/buffer.h"
#include "core/range.h"
#include "cpu/batch_norm_lanes.h"
#include "cpu/parallel_range.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {

// Images of one pixel are both layouts; as pixels they fill vectors.
constexpr bool runs_as_pixels(const BatchNormProblem& p) {
  return p.layout == Layout::kNHWC || (p.H == 1 && p.W == 1);
}

// The constants of channels: `pitch` from one to the next of the same channel.
template <typename Lane>
struct ConstantRows {
  Lane* first;
  int64_t pitch;

  Lane* row(int k) const { return first + k * pitch; }
  ConstantRows from(int64_t channel) const { return {first + channel, pitch}; }
};

// One of them as the loops take it: in planes the first channel's in every lane, in pixels each
// channel's in its own.
template <typename Lane, bool kPlanes>
struct LaneConstants {
  ConstantRows<Lane> rows;

  TORCHCONV_INLINE typename Vec<Lane>::Type operator[](int k) const {
    return kPlanes ? Vec<Lane>::broadcast(*rows.row(k)) : Vec<Lane>::load(rows.row(k));
  }
};

// Two factors: what the first pass sums is `one` and its product with the other.
template <typename V>
struct Terms {
  V one, other;
};

// Pass: what is done to the elements, with
//   kConstants: of each channel, in rows of the lanes' type;
//   reads(): how many arrays the first pass reads, 0 where there is none;
//   writes(), streams(): whether there is a second, and past the caches;
//   prepare(channels, rows): the constants of the first pass;
//   source(): what has take(constants), to begin with other channels, terms<partial>(at, n), of n
//     lanes, prefetch(at), and arrays(), how many it goes through;
//   accepts(channels, rows, sums, width): whether sums of a few elements in the lanes' type will
//     do, else it prepares for exact ones; kTwice: whether it may not accept them;
//   finish(channels, rows, sums, width): the constants of the second pass;
//   kVectors: that the first pass takes together, a power of two;
//   target(): what has take(constants), write<partial>(at, n), and arrays(), how many it goes
//     through.
// Channels are those of a tile, whose first constants and sums are where the pointers are, the
// second sums `width` after the first.
template <typename T, typename Pass>
class NormPasses : NormLanes<T> {
  using L = NormLanes<T>;
  using L::kLanes;
  using typename L::Lane;
  using typename L::Lanes;
  using typename L::Sum;
  using typename L::V;
  static constexpr int kConstants = Pass::kConstants;
  static constexpr int64_t kTile = kChannelTile;
  // So many vectors are added up in the lanes' type.
  static constexpr int kFew = 16;
  // In the first pass so many pixels in turn keep a vector's sums in registers.
  static constexpr int64_t kPixelRows = kFew;
  // Operations (work_grain) for each element: of an array that the first pass reads, and of one
  // that the second goes through.
  static constexpr double kReadOperations = 4, kWriteOperations = 2;

 public:
  NormPasses(const BatchNormProblem& p, const Parallel& pool, const Pass& pass)
      : p_(p), pool_(pool), pass_(pass), pixels_(p.N * p.H * p.W) {}

  void run() const {
    if (runs_as_pixels(p_)) {
      run_pixels();
    } else {
      run_planes();
    }
  }

 private:
  using Rows = ConstantRows<Lane>;
  using OfPlanes = LaneConstants<Lane, true>;
  using OfPixels = LaneConstants<Lane, false>;

  template <bool kExact>
  struct Sums {
    Sum sum{}, products{};
    V few{}, few_products{};

    TORCHCONV_INLINE void add(const Terms<V>& terms) {
      if constexpr (kExact) {
        const Sum one = L::widen(terms.one);
        sum.add(one);
        products.add_product(one, L::widen(terms.other));
      } else {
        few += terms.one;
        few_products += terms.one * terms.other;
      }
    }
    // Of kFew that were added, or what there is at the end.
    TORCHCONV_INLINE void widen() {
      if constexpr (kExact) return;
      sum.add(L::widen(few));
      products.add(L::widen(few_products));
      few = few_products = V{};
    }
  };

  double read_operations() const { return kReadOperations * pass_.reads(); }
  double write_operations() const {
    return pass_.writes() ? kWriteOperations * pass_.target().arrays() : 0;
  }

  // --- planes ---

  void run_planes() const {
    constexpr int64_t kGroupBytes = 512 << 10;
    // Those of one channel, in all arrays that are read twice.
    const int64_t bytes =
        pixels_ * static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(pass_.reads(), 1);
    // Not so many channels that there were few groups for many threads.
    const int64_t most = std::min(ceil_div(p_.C, kTile), kTile);
    const int64_t size = std::clamp<int64_t>(kGroupBytes / bytes, 1, most);
    const double operations =
        (read_operations() + write_operations()) * static_cast<double>(size * pixels_);
    parallel_for(pool_, 0, ceil_div(p_.C, size), work_grain(operations),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t g = begin; g < end; ++g)
                     run_group({g * size, std::min(size, p_.C - g * size)});
                   if (pass_.streams()) stream_fence();
                 });
  }

  void run_group(Channels c) const {
    Lane constants[kConstants * kTile];
    double sums[2 * kTile] = {};
    const Rows rows{constants, kTile};
    pass_.prepare(c, rows);
    if (pass_.reads() > 0) {
      reduce_planes<false>(c, rows, sums);
      if constexpr (Pass::kTwice)
        if (!pass_.accepts(c, rows, sums, kTile)) reduce_planes<true>(c, rows, sums);
    }
    pass_.finish(c, rows, sums, kTile);
    if (!pass_.writes()) return;
    write_planes(c, rows);
  }

  template <bool kExact>
  void reduce_planes(Channels c, Rows rows, double* sums) const {
    for (int64_t i = 0; i < c.count; ++i) {
      const Sums<kExact> of = planes_sums<kExact>(c.first + i, rows.from(i));
      sums[i] = of.sum.total();
      sums[kTile + i] = of.products.total();
    }
  }

  template <bool kExact>
  Sums<kExact> planes_sums(int64_t channel, Rows constants) const {
    auto source = pass_.source();
    source.take(OfPlanes{constants});
    const int64_t plane = p_.H * p_.W, image = p_.C * plane, ahead = planes_ahead();
    Sums<kExact> sums;
    int count = 0;
    for (int64_t n = 0; n < p_.N; ++n) {
      const int64_t end = n * image + (channel + 1) * plane;
      int64_t at = end - plane;
      for (; at + kLanes <= end; at += kLanes) {
        source.prefetch(at + ahead);
        sums.add(source.template terms<false>(at, kLanes));
        if (++count == kFew) sums.widen(), count = 0;
      }
      if (at < end) {
        sums.add(source.template terms<true>(at, end - at));
        if (++count == kFew) sums.widen(), count = 0;
      }
    }
    sums.widen();
    return sums;
  }

  // Image by image, in which the channels' planes follow one another.
  void write_planes(Channels c, Rows rows) const {
    auto target = pass_.target();
    const int64_t plane = p_.H * p_.W, image = p_.C * plane;
    for (int64_t n = p_.N - 1; n >= 0; --n) {
      int64_t at = n * image + c.first * plane;
      for (int64_t i = 0; i < c.count; ++i) {
        target.take(OfPlanes{rows.from(i)});
        const int64_t end = at + plane;
        for (; at + kLanes <= end; at += kLanes) target.template write<false>(at, kLanes);
        if (at < end) target.template write<true>(at, end - at);
        at = end;
      }
    }
  }

  // The next channel's planes lie behind these: to be prefetched where planes are so short that the
  // hardware would notice their runs too late, and both with their outputs fit in the cache.
  int64_t planes_ahead() const {
    constexpr int64_t kMostElements = 1 << 15;
    return pixels_ <= kMostElements ? p_.H * p_.W : 0;
  }

  // --- pixels ---

  struct Region {
    int64_t first, pixels;
    Channels channels;
  };

  // Enough pixels that their sums are few beside them, and enough blocks for many threads.
  struct Blocks {
    int64_t pixels, channels, size, count;

    Blocks(int64_t all, int64_t of_channels) : pixels(all), channels(of_channels) {
      constexpr int64_t kElements = 1 << 14, kFewest = 64, kMost = 128, kUnit = 4;
      const int64_t least = std::max(kFewest, kElements / channels);
      const int64_t wanted = std::min(round_up(ceil_div(all, least), kUnit), kMost);
      size = round_up(ceil_div(all, wanted), kPixelRows);
      count = ceil_div(all, size);
    }
    Region region(int64_t block) const {
      return {block * size, std::min(size, pixels - block * size), {0, channels}};
    }
  };

  void run_pixels() const {
    constexpr int64_t kStrips = 4, kFewestChannels = 32, kMostPixels = 1 << 9;
    const int64_t strip = round_up(ceil_div(p_.C, kStrips), kLanes);
    const bool strips = strip >= kFewestChannels && pixels_ <= kMostPixels;
    const Blocks blocks(pixels_, p_.C);
    const int64_t width = round_up(p_.C, kLanes);
    const Buffer<Lane> constants(kConstants * width);
    std::fill_n(constants.get(), kConstants * width, Lane{0});
    const Rows rows{constants.get(), width};
    // All together, and then of each block.
    const Buffer<double> sums(pass_.reads() > 0 ? (strips ? 1 : blocks.count + 1) * 2 * width : 1);
    if (!strips) return run_blocks(blocks, rows, sums.get());
    const double operations =
        (read_operations() + write_operations()) * static_cast<double>(strip * pixels_);
    parallel_for(pool_, 0, ceil_div(p_.C, strip), work_grain(operations),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t c = begin * strip; c < std::min(end * strip, p_.C); c += strip)
                     run_strip({c, std::min(strip, p_.C - c)}, rows, sums.get());
                   if (pass_.streams()) stream_fence();
                 });
  }

  void run_strip(Channels c, Rows rows, double* sums) const {
    const Region all{0, pixels_, c};
    over_tiles(c, [&](Channels tile) { pass_.prepare(tile, rows.from(tile.first)); });
    if (pass_.reads() > 0) {
      reduce<false>(all, rows, sums);
      if constexpr (Pass::kTwice) {
        bool accepted = true;
        over_tiles(c, [&](Channels tile) { accepted &= accepts(tile, rows, sums); });
        if (!accepted) reduce<true>(all, rows, sums);
      }
    }
    over_tiles(c, [&](Channels tile) { finish(tile, rows, sums); });
    if (pass_.writes()) write(all, rows);
  }

  void run_blocks(const Blocks& blocks, Rows rows, double* sums) const {
    over_channels(blocks, [&](Channels tile) { pass_.prepare(tile, rows.from(tile.first)); });
    if (pass_.reads() > 0) {
      const bool accepted = reduce_blocks<false>(blocks, rows, sums);
      if constexpr (Pass::kTwice)
        if (!accepted) reduce_blocks<true>(blocks, rows, sums);
    }
    over_channels(blocks, [&](Channels tile) { finish(tile, rows, sums); });
    if (!pass_.writes()) return;
    over_blocks(blocks, write_operations(), [&](int64_t begin, int64_t end) {
      for (int64_t b = end - 1; b >= begin; --b) write(blocks.region(b), rows);
      if (pass_.streams()) stream_fence();
    });
  }

  // Whether they are accepted.
  template <bool kExact>
  bool reduce_blocks(const Blocks& blocks, Rows rows, double* sums) const {
    const int64_t width = rows.pitch;
    over_blocks(blocks, read_operations(), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        reduce<kExact>(blocks.region(b), rows, sums + (b + 1) * 2 * width);
    });
    std::atomic<bool> accepted{true};
    over_channels(blocks, [&](Channels tile) {
      for (int64_t i = tile.first; i < tile.first + tile.count; i += kLanes) {
        Sum sum{}, products{};
        for (int64_t b = 0; b < blocks.count; ++b) {
          const double* const of_block = sums + (b + 1) * 2 * width + i;
          sum.add(Sum::load(of_block));
          products.add(Sum::load(of_block + width));
        }
        sum.store(sums + i);
        products.store(sums + width + i);
      }
      if constexpr (Pass::kTwice && !kExact)
        if (!accepts(tile, rows, sums)) accepted = false;
    });
    return accepted;
  }

  // By the index of channels.
  bool accepts(Channels tile, Rows rows, const double* sums) const {
    return pass_.accepts(tile, rows.from(tile.first), sums + tile.first, rows.pitch);
  }
  void finish(Channels tile, Rows rows, const double* sums) const {
    pass_.finish(tile, rows.from(tile.first), sums + tile.first, rows.pitch);
  }

  template <typename F>
  static void over_tiles(Channels c, const F& f) {
    for (int64_t i = 0; i < c.count; i += kTile)
      f(Channels{c.first + i, std::min(kTile, c.count - i)});
  }

  template <typename F>
  void over_channels(const Blocks& blocks, const F& f) const {
    constexpr double kRootOperations = 200;
    const double operations = kRootOperations + kReadOperations * static_cast<double>(blocks.count);
    parallel_for(pool_, 0, ceil_div(p_.C, kTile), work_grain(operations * kTile),
                 [&](int64_t begin, int64_t end) {
                   const int64_t first = begin * kTile;
                   over_tiles({first, std::min(end * kTile, p_.C) - first}, f);
                 });
  }

  // operations: for each element.
  template <typename F>
  void over_blocks(const Blocks& blocks, double operations, const F& f) const {
    operations *= static_cast<double>(blocks.size * p_.C);
    parallel_for(pool_, 0, blocks.count, work_grain(operations), f);
  }

  // Whether a pass finds little in the caches of its own core or near it. Far memory is written
  // fastest in long runs, near memory with all constants in registers.
  bool far() const {
    constexpr int64_t kFarBytes = 8 << 20;
    return std::max(pass_.reads(), 1) * pixels_ * p_.C * static_cast<int64_t>(sizeof(T)) >=
           kFarBytes;
  }

  // The sums of a region, by the index of channels.
  template <bool kExact>
  void reduce(const Region& region, Rows rows, double* sums) const {
    constexpr int kVectors = Pass::kVectors;
    const bool in_order = reads_in_order(region.channels);
    for (double* const to : {sums, sums + rows.pitch})
      std::fill_n(to + region.channels.first, round_up(region.channels.count, kLanes), 0.0);
    const int64_t end = region.first + region.pixels;
    for (int64_t r = region.first; r < end; r += kPixelRows) {
      const int64_t count = std::min(kPixelRows, end - r);
      if constexpr (kExact) {
        reduce_runs<true, 1>(r, count, region.channels, rows, sums);
      } else if (in_order) {
        over_spans(region.channels,
                   [&](Channels span) { reduce_span(r, count, span, rows, sums); });
      } else {
        reduce_runs<false, kVectors>(r, count, region.channels, rows, sums);
      }
    }
  }

  // Whether to go through pixels one after another, with the sums in memory, and not through runs
  // of each of kPixelRows, with the sums in registers. Three or four far arrays (of a residual)
  // then take 0.75 of the time if a pixel is several runs; two, or near ones, take longer.
  bool reads_in_order(Channels channels) const {
    constexpr int64_t kFewestChannels = 256, kFarBytes = 32 << 20;
    const int64_t arrays = pass_.source().arrays();
    return arrays > pass_.reads() && channels.count >= kFewestChannels &&
           arrays * pixels_ * p_.C * static_cast<int64_t>(sizeof(T)) >= kFarBytes;
  }

  // What reduce_span takes: its sums and constants stay in the first-level cache.
  static constexpr int64_t kSpan = 512;

  template <typename F>
  static void over_spans(Channels c, const F& f) {
    for (int64_t i = 0; i < c.count; i += kSpan)
      f(Channels{c.first + i, std::min(kSpan, c.count - i)});
  }

  void reduce_span(int64_t pixel, int64_t count, Channels span, Rows rows, double* sums) const {
    alignas(64) Lane few[kSpan] = {}, few_products[kSpan] = {};
    const auto blank = pass_.source();
    const int64_t pitch = p_.C;
    int64_t at = pixel * pitch + span.first;
    for (int64_t r = 0; r < count; ++r, at += pitch) {
      const auto column = [&](auto partial, int64_t c) TORCHCONV_INLINE_LAMBDA {
        auto source = blank;
        source.take(OfPixels{rows.from(span.first + c)});
        const auto terms = source.template terms<partial.value>(at + c, span.count - c);
        Lanes::store(few + c, Lanes::load(few + c) + terms.one);
        Lanes::store(few_products + c, Lanes::load(few_products + c) + terms.one * terms.other);
      };
      int64_t c = 0;
      for (; c + kLanes <= span.count; c += kLanes) column(std::false_type(), c);
      if (c < span.count) column(std::true_type(), c);
    }
    double* const products = sums + rows.pitch;
    for (int64_t c = 0; c < span.count; c += kLanes) {
      const auto add = [&](double* to, const Lane* from) {
        Sum sum = Sum::load(to + span.first + c);
        sum.add(L::widen(Lanes::load(from + c)));
        sum.store(to + span.first + c);
      };
      add(sums, few);
      add(products, few_products);
    }
  }

  // So many vectors of channels at a time, and of the rest half as many: what training reads here
  // was written long before, and long runs are fetched ahead.
  template <bool kExact, int kVectors>
  void reduce_runs(int64_t pixel, int64_t count, Channels channels, Rows rows, double* sums) const {
    constexpr int64_t kRun = kVectors * kLanes;
    int64_t c = channels.first;
    const int64_t last = c + channels.count;
    for (; c + kRun <= last; c += kRun)
      reduce_run<kExact, kVectors, false>(pixel, count, c, rows, sums);
    if constexpr (kVectors > 1) {
      reduce_runs<kExact, kVectors / 2>(pixel, count, {c, last - c}, rows, sums);
    } else if (c < last) {
      reduce_run<kExact, 1, true>(pixel, count, c, rows, sums);
    }
  }

  template <bool kExact, int kVectors, bool kPartial>
  TORCHCONV_INLINE void reduce_run(int64_t pixel, int64_t count, int64_t c, Rows rows,
                                   double* sums) const {
    double* const products = sums + rows.pitch;
    const int64_t pitch = p_.C;
    const auto blank = pass_.source();
    std::remove_const_t<decltype(blank)> source[kVectors];
    Sums<kExact> of[kVectors];
    unroll<kVectors>([&](auto v) TORCHCONV_INLINE_LAMBDA {
      source[v] = blank;
      source[v].take(OfPixels{rows.from(c + v * kLanes)});
    });
    int64_t at = pixel * pitch + c;
    for (int64_t r = 0; r < count; ++r, at += pitch)
      unroll<kVectors>([&](auto v) TORCHCONV_INLINE_LAMBDA {
        of[v].add(source[v].template terms<kPartial>(at + v * kLanes, pitch - c));
      });
    unroll<kVectors>([&](auto v) TORCHCONV_INLINE_LAMBDA {
      const int64_t i = c + v * kLanes;
      of[v].sum.add(Sum::load(sums + i));
      of[v].products.add(Sum::load(products + i));
      of[v].widen();
      of[v].sum.store(sums + i);
      of[v].products.store(products + i);
    });
  }

  void write(const Region& region, Rows rows) const {
    auto target = pass_.target();
    const int64_t pitch = p_.C;
    // So many pixels in turn keep the constants in registers, no more than one set of the
    // first-level cache holds where their pitch is a power of two. What is far is read in the order
    // of memory.
    const int64_t few = far() ? 1 : target.arrays() > 2 ? 2 : 4;
    const int64_t end = region.first + region.pixels;
    const int64_t last = region.channels.first + region.channels.count;
    for (int64_t r = region.first; r < end; r += few) {
      const int64_t count = std::min(few, end - r);
      const auto column = [&](auto partial, int64_t c) {
        target.take(OfPixels{rows.from(c)});
        int64_t at = r * pitch + c;
        for (int64_t i = 0; i < count; ++i, at += pitch)
          target.template write<partial.value>(at, pitch - c);
      };
      int64_t c = region.channels.first;
      for (; c + kLanes <= last; c += kLanes) column(std::false_type(), c);
      if (c < last) column(std::true_type(), c);
    }
  }

  const BatchNormProblem& p_;
  const Parallel& pool_;
  const Pass& pass_;
  int64_t pixels_;
};

}  // namespace torchconv::cpu
