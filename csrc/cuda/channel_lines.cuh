// How the warps of depthwise_channel_mma.cu share the problem, and how rows of input come into
// shared memory.
//
// A span is some neighbouring output columns. A warp has a slab of channels of some spans, of one
// or several images, and rolls them down over the rows of its set. Rows come through a ring of the
// warp's own, by copies that no register waits for, and no warp waits for another. The padded rows
// of all images, one after another, make a line in which the window of every span has its place.
#pragma once

#include <algorithm>

#include "cuda/depthwise.h"
#include "cuda/tensor_core.h"

namespace torchconv::cuda {

struct ChannelLines {
  Gather g;
  int channels;
  Divisor slabs, sets;        // of a pixel's channels; of an image's rows
  Divisor spans, line;        // of an image's row of outputs; pixels of a row with its padding
  int tile, set;              // spans of a warp; rows of a set
  int row_bytes;              // of a warp's row in shared memory
  uint32_t positions, warps;  // spans of all images; warps with work
};

inline constexpr int kLineWarps = 4;  // of a block

// Spans of kSpan columns by an R x R kernel of stride 1; kWords: pairs of channels of a lane. A
// span's columns of outputs lie side by side in the eight columns of an mma, and a unit of its
// window's columns, as many, in eight of its sixteen terms.
template <typename T_, int R_, int kSpan_, int kWords_, int kBlocks_>
struct LineTile {
  using T = T_;
  static constexpr int R = R_, kSpans = 16, kSpan = kSpan_;
  static constexpr int kWords = kWords_, kVector = 2 * kWords;
  static constexpr int kPairs = 4 / kSpan;  // lanes along the channels
  static constexpr int kChannels = kPairs * kVector;
  static constexpr int kUnits = (kSpan - 1 + R + kSpan - 1) / kSpan;
  static constexpr int kWindow = kUnits * kSpan, kHalo = kWindow - kSpan;
  // Rows of the ring, all but one of which are under way; blocks of a multiprocessor.
  static constexpr int kDepth = 6, kBlocks = kBlocks_;
  static constexpr int kBytes = static_cast<int>(sizeof(T));
  static constexpr int kPixel = kChannels * kBytes, kChunks = kPixel / 16;
  // Copies of 16 bytes that a lane makes of a row: there is room for a few images' padding.
  static constexpr int kImages = 4;
  static constexpr int kCopies =
      (((kSpans - 1) * kSpan + kWindow + (kImages - 1) * kHalo) * kChunks + 31) / 32;
  // About how many cycles a row of a warp keeps a multiprocessor's units busy: each of the four
  // processors has a quarter of the products.
  static constexpr int64_t kClocks = R * kUnits * kWords * 4 / 5;

  // Pixels that the windows of `tile` neighbouring spans take, of which a row has `spans`.
  static int64_t pixels(int64_t tile, int64_t spans) {
    return (tile - 1) * kSpan + kWindow + ceil_div(tile - 1, spans) * kHalo;
  }
  // Where a span's window begins in the line.
  static __device__ __forceinline__ int begin(const ChannelLines& p, uint32_t span) {
    const uint32_t column = p.spans.split(span);
    return static_cast<int>(span * p.line.value() + column * kSpan);
  }
};

// A warp's part of the problem.
template <typename S>
struct LineWarp {
  int channel0, row0, rows;
  uint32_t span0;
  int spans, line0;
  int h0, steps;  // rows of input

  __device__ __forceinline__ LineWarp(const ChannelLines& p, uint32_t number) {
    channel0 = static_cast<int>(p.slabs.split(number)) * S::kChannels;
    row0 = static_cast<int>(p.sets.split(number)) * p.set;
    rows = min(p.set, p.g.h.out - row0);
    span0 = number * static_cast<uint32_t>(p.tile);
    spans = static_cast<int>(min(static_cast<uint32_t>(p.tile), p.positions - span0));
    line0 = S::begin(p, span0);
    h0 = row0 + p.g.h.origin;
    steps = rows - 1 + S::R;
  }
};

// The rows of a warp's window in shared memory, kDepth of them. A row that is all padding is not
// copied.
template <typename S>
struct LineRing {
  using T = typename S::T;
  const char* rows;
  const char* source;  // the first row's first copy, and how far from it the lane's copies are
  uint32_t offset[S::kCopies];
  int64_t in_row;
  uint32_t present, inside;  // bits: copies that there are, and those of a pixel
  int into, bytes, lane;
  int h, end, height;  // the next row to copy, the last one

  __device__ __forceinline__ LineRing(const ChannelLines& p, const LineWarp<S>& warp, const T* in) {
    const Gather& g = p.g;
    lane = static_cast<int>(threadIdx.x) % 32;
    bytes = p.row_bytes, into = 0;
    rows = dynamic_shared<char>() + static_cast<int>(threadIdx.x) / 32 * S::kDepth * bytes;
    in_row = static_cast<int64_t>(g.w.in) * p.channels;
    present = 0, inside = 0;
    h = warp.h0, end = warp.h0 + warp.steps, height = g.h.in;
    uint32_t image = static_cast<uint32_t>(warp.line0);
    const int column0 = static_cast<int>(p.line.split(image)) + g.w.origin;
    source =
        reinterpret_cast<const char*>(in + (static_cast<int64_t>(image) * g.h.in + h) * in_row +
                                      static_cast<int64_t>(column0) * p.channels + warp.channel0);
    const uint32_t last = warp.span0 + static_cast<uint32_t>(warp.spans - 1);
    const int pixels = S::begin(p, last) - warp.line0 + S::kWindow;
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      const int chunk = i * 32 + lane, pixel = chunk / S::kChunks;
      const int c = warp.channel0 + chunk % S::kChunks * (16 / static_cast<int>(sizeof(T)));
      uint32_t n = static_cast<uint32_t>(warp.line0 + pixel);
      const int column = static_cast<int>(p.line.split(n)) + g.w.origin;
      offset[i] = ((n - image) * static_cast<uint32_t>(g.h.in * g.w.in) +
                   static_cast<uint32_t>(column - column0)) *
                      static_cast<uint32_t>(S::kBytes * p.channels) +
                  static_cast<uint32_t>(S::kBytes * (c - warp.channel0));
      if (pixel < pixels) present |= 1u << i;
      if (static_cast<unsigned>(column) < static_cast<unsigned>(g.w.in) && n < g.N &&
          c < p.channels)
        inside |= 1u << i;
    }
  }

  // Starts the copy of the next row.
  __device__ __forceinline__ void load() {
    const bool row = h < end && static_cast<unsigned>(h) < static_cast<unsigned>(height);
#pragma unroll
    for (int i = 0; i < S::kCopies; ++i) {
      if (row && (present >> i & 1) != 0)
        copy_async<16>(shared_address(rows + into + (i * 32 + lane) * 16),
                       source + static_cast<int32_t>(offset[i]), (inside >> i & 1) != 0);
    }
    copy_async_commit();
    ++h, source += in_row * S::kBytes;
    into += bytes;
    if (into == S::kDepth * bytes) into = 0;
  }
};

// Rows of a set: few are worked on twice, but there are warps enough for a large device.
// `warps`: of a multiprocessor, as few as which there are to be; 0 leaves it to an estimate.
template <typename S>
int64_t rows_of_set(const ChannelLines& p, int64_t columns_of_warps, int64_t warps) {
  constexpr int64_t kLatency = 1000, kStart = 2000, kDevice = 132;
  const int64_t all = p.g.h.out, out_bytes = S::kSpans * S::kSpan * S::kPixel;
  const int64_t each_row = std::max(S::kClocks, (p.row_bytes + out_bytes) / 20);
  const int64_t resident =
      kLineWarps *
      std::min<int64_t>(S::kBlocks, 220 * 1024 / (kLineWarps * S::kDepth * p.row_bytes));
  int64_t best = all, least = 0;
  for (int64_t sets = 1; sets <= all; ++sets) {
    const int64_t rows = ceil_div(all, sets);
    if (ceil_div(all, rows) != sets) continue;
    const int64_t each = ceil_div(columns_of_warps * sets, kDevice);
    if (warps > 0) {
      best = rows;
      if (each >= warps) break;
      continue;
    }
    const int64_t held = std::min(each, resident);
    const int64_t cost =
        (kStart + (rows - 1 + S::R) * std::max(kLatency / (S::kDepth - 1), held * each_row)) *
        each / held;
    if (least == 0 || cost < least) best = rows, least = cost;
  }
  return best;
}

// The problem cut into tiles; false where there are too many of anything.
template <typename S>
bool channel_lines(const Gather& g, int64_t warps, ChannelLines& p) {
  const int64_t spans = ceil_div(g.w.out, S::kSpan), line = spans * S::kSpan + S::kHalo;
  if (g.N * line >= int64_t{1} << 30) return false;
  p.g = g;
  p.channels = g.groups;
  p.positions = static_cast<uint32_t>(g.N * spans);
  int64_t tile = std::min<int64_t>(S::kSpans, p.positions);
  while (S::pixels(tile, spans) * S::kChunks > S::kCopies * 32) --tile;
  p.tile = static_cast<int>(tile);
  p.row_bytes = static_cast<int>(S::pixels(tile, spans) * S::kPixel);
  // Copies of a row are within 32 bits of each other, over all images of a tile.
  const int64_t images = ceil_div(tile - 1, spans) + 1;
  if (images * g.h.in * g.w.in >= (int64_t{1} << 31) / (S::kBytes * g.groups) - 64) return false;
  const int64_t slabs = ceil_div(g.groups, S::kChannels), tiles = ceil_div(p.positions, tile);
  const int64_t set = rows_of_set<S>(p, slabs * tiles, warps);
  const int64_t sets = ceil_div(g.h.out, set);
  if (slabs * tiles * sets >= int64_t{1} << 30) return false;
  p.slabs = Divisor(slabs), p.sets = Divisor(sets);
  p.spans = Divisor(spans), p.line = Divisor(line);
  p.set = static_cast<int>(set);
  p.warps = static_cast<uint32_t>(slabs * tiles * sets);
  return true;
}

// Whether lines can compute g: one filter a channel, and channels and pointers of 16 bytes.
template <typename T>
bool channel_lines_take(const Gather& g, const void* in, const void* out, Activation activation,
                        const Queue& queue) {
  return queue.capability >= 80 && g.in_channels == 1 && g.out_channels == 1 &&
         g.groups % kLanes<T> == 0 && g.N > 0 && g.h.out > 0 && g.w.out > 0 &&
         aligned<T>(in, kLanes<T>) && aligned<T>(out, kLanes<T>) &&
         (activation == Activation::kNone || activation == Activation::kReLU ||
          activation == Activation::kReLU6);
}

}  // namespace torchconv::cuda
