// A band of rows of grouped images with the channels of a pixel side by side, in either layout: the
// operand of the tiles of microkernels/group_tile.h.
//
// Several groups lie in one vector where it holds them whole, and else each group has vectors of
// its own; the groups that are computed together are a block. The band holds what some output rows
// of a block read, converted to the computing type and with the padding written out:
//
//   [vector of channels][row][column][lanes]
//
// Where bfloat16 is multiplied in pairs (channel_pairs.h), what is called a channel here is a pair,
// and the view is the one of pairs.
//
// The kernel's taps are cut into runs of neighbours in a row, which share pixels in registers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/channel_pairs.h"
#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/group_tile.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {

// Taps (h, w), ..., (h, w + count - 1).
struct GroupRun {
  int64_t h, w, count;
  int64_t weights[kMaxRun];
};
// Those of equal count are neighbours.
std::vector<GroupRun> group_runs(const ConvView& view);

// Part of an image: `channels` of a vector, rows [h, h + rows) and columns [w, w + columns), zero
// outside H x W.
struct GroupWindow {
  ConvStrides strides;
  int64_t channels, H, W, h, rows, w, columns;
  int64_t ahead;  // from a pixel to one that will be read later
};

// Rows of the first `count` planes, each row `width` pixels.
template <typename T>
void expect_planes(const T* planes, const ConvStrides& strides, int64_t count, const Range& rows,
                   int64_t width, SourcePrefetch& ahead) {
  constexpr int64_t kSize = sizeof(T);
  if (rows.empty()) return;
  // Whole rows are one run.
  const bool whole = strides.column == 1 && strides.row == width;
  const int64_t runs = whole ? 1 : rows.size(), run = whole ? rows.size() * width : width;
  for (int64_t r = 0; r < runs; ++r)
    ahead.add(planes + (rows.begin + r) * strides.row, count, strides.c * kSize,
              run * strides.column * kSize);
}

struct GroupBand {
  // unit: of output rows.
  GroupBand(const ConvView& view, int64_t element_size, bool permutes, int64_t unit = 1);
  bool fits;

  int64_t lanes;                     // of a vector
  int64_t groups, blocks;            // groups in a block
  int64_t src_vectors, dst_vectors;  // of a block
  int64_t vector_filters;            // lanes of a result's vector that are used
  int64_t band, bands;               // output rows
  int64_t width, rows, plane, size;  // of the band; a plane is one vector's
  int64_t first_h, first_w;

  int64_t groups_in(const ConvView& view, int64_t block) const {
    return std::min(groups, view.groups - block * groups);
  }
  // Those of a vector of results.
  int64_t filters_in(const ConvView& view, int64_t block, int64_t vector) const {
    const int64_t filters = groups_in(view, block) * view.K - vector * vector_filters;
    return std::clamp<int64_t>(filters, 0, vector_filters);
  }
  // Of a tap at (h, w) from the band's first output.
  int64_t offset(int64_t h, int64_t w) const {
    return ((h - first_h) * width + w - first_w) * lanes;
  }
  // Source lanes of channel 0 for the lanes of all vectors of results.
  template <typename A>
  std::vector<LaneIndex<A>> source_lanes(const ConvView& view) const {
    std::vector<LaneIndex<A>> index(static_cast<size_t>(dst_vectors * lanes));
    for (int64_t i = 0; i < dst_vectors * lanes; ++i) {
      const int64_t filter = i / lanes * vector_filters + std::min(i % lanes, vector_filters - 1);
      index[i] = static_cast<LaneIndex<A>>(std::min(filter / view.K, groups - 1) * view.C);
    }
    return index;
  }

  // src: the sample. asks: for what the next band reads.
  template <typename T, bool kPairs = false>
  void fill(const ConvView& view, const T* src, int64_t block, int64_t i0, Wide<T>* scratch,
            bool asks = true) const;
};

// Task `task` of N * bands * blocks, in an order in which neighbours read neighbouring memory: in
// channels_last the blocks of a band, else the bands and samples of a block, as GroupBand::fill
// expects.
struct GroupTask {
  int64_t n, band, block;

  GroupTask(const GroupBand& cut, const ConvView& view, int64_t task) {
    const int64_t blocks = view.src.c == 1 ? cut.blocks : 1;
    block = view.src.c == 1 ? task % blocks : task / (view.N * cut.bands);
    band = task / blocks % cut.bands;
    n = task / (blocks * cut.bands) % view.N;
  }
};

// to[row][column][lanes] from src, the image's first of these channels. kPairs: a pair of channels
// is one where pixels are neighbours; else pairs are elements already.
template <typename T, bool kPairs = false>
void copy_group_window(const GroupWindow& window, const T* src, Wide<T>* to) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  const ConvStrides& s = window.strides;
  const auto inside = [](int64_t first, int64_t count, int64_t size) {
    const int64_t begin = std::clamp(-first, int64_t{0}, count);
    return Range{begin, std::clamp(size - first, begin, count)};
  };
  const Range rows = inside(window.h, window.rows, window.H);
  const Range columns = inside(window.w, window.columns, window.W);
  const int64_t row_size = window.columns * kL;
  if (rows.empty() || columns.empty()) return fill_zero(to, window.rows * row_size);
  fill_zero(to, rows.begin * row_size);
  fill_zero(to + rows.end * row_size, (window.rows - rows.end) * row_size);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    fill_zero(to + r * row_size, columns.begin * kL);
    fill_zero(to + r * row_size + columns.end * kL, (window.columns - columns.end) * kL);
  }
  src += (window.h + rows.begin) * s.row + (window.w + columns.begin) * s.column;
  to += rows.begin * row_size + columns.begin * kL;
  if (s.c == 1) {
    for (int64_t r = 0; r < rows.size(); ++r, to += row_size, src += s.row) {
      const T* pixel = src;
      if (window.channels == kL) {
        for (int64_t p = 0; p < columns.size(); ++p, pixel += s.column) {
          __builtin_prefetch(pixel + window.ahead, 0, 2);
          V::Registers::store(to + p * kL, V::load(pixel));
        }
      } else {
        for (int64_t p = 0; p < columns.size(); ++p, pixel += s.column) {
          __builtin_prefetch(pixel + window.ahead, 0, 2);
          V::Registers::store(to + p * kL, V::load_partial(pixel, window.channels));
        }
      }
    }
    return;
  }
  // Else pixels are neighbours: square pieces of channels and pixels are transposed. Whole rows are
  // one run of pixels.
  const bool whole = columns.size() == s.row;
  const int64_t runs = whole ? 1 : rows.size();
  const int64_t run = whole ? rows.size() * columns.size() : columns.size();
  const int64_t gap = (window.columns - columns.size()) * kL;
  for (int64_t r = 0; r < runs; ++r, to += row_size, src += s.row) {
    const auto load = [&](int64_t c, int64_t p, int64_t n) {
      if constexpr (kPairs) {
        const T* first = src + p + 2 * c * s.c;
        return bit_cast<typename V::Type>(zip_pairs(first, n, first + s.c, n));
      } else {
        return n == kL ? V::load(src + p + c * s.c) : V::load_partial(src + p + c * s.c, n);
      }
    };
    constexpr int64_t kPlanes = kPairs ? 2 : 1;
    Wide<T>* at = to;
    int64_t rest = columns.size();
    for (int64_t p = 0; p < run; p += kL) {
      const int64_t n = std::min(kL, run - p);
      for (int64_t c = 0; window.ahead != 0 && c < kPlanes * window.channels; ++c)
        __builtin_prefetch(src + p + c * s.c + window.ahead, 0, 2);
      typename V::Type tile[kL];
      if (window.channels == kL && n == kL) {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c) tile[c] = load(c, p, kL);
      } else {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c)
          tile[c] = c < window.channels ? load(c, p, n) : typename V::Type{};
      }
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) {
        if (l >= n) continue;
        V::Registers::store(at, tile[l]);
        at += kL;
        if (--rest == 0) {
          rest = columns.size();
          at += gap;
        }
      }
    }
  }
}

template <typename T, bool kPairs>
void GroupBand::fill(const ConvView& view, const T* src, int64_t block, int64_t i0,
                     Wide<T>* scratch, bool asks) const {
  constexpr int64_t kChannels = kPairs ? 2 : 1;
  const int64_t channels = groups_in(view, block) * view.C;
  src += block * groups * view.C * kChannels * view.src.c;
  // The same rows' part of the next band, or sample.
  const int64_t ahead = !asks                ? 0
                        : i0 + band < view.I ? band * view.step_h * view.src.row
                                             : view.src.n - i0 * view.step_h * view.src.row;
  GroupWindow window{view.src, 0,       view.H, view.W, i0 * view.step_h + first_h,
                     rows,     first_w, width,  ahead};
  for (int64_t v = 0; v < src_vectors; ++v) {
    window.channels = std::min(lanes, channels - v * lanes);
    const T* from = src + v * lanes * kChannels * view.src.c;
    Wide<T>* const to = scratch + v * plane;
    if constexpr (kPairs) {
      if (view.src.c == 1) {
        GroupWindow pairs = window;
        pairs.strides.row /= 2, pairs.strides.column /= 2, pairs.ahead /= 2;
        copy_group_window(pairs, reinterpret_cast<const float*>(from), to);
        continue;
      }
    }
    copy_group_window<T, kPairs>(window, from, to);
  }
}

}  // namespace torchconv::cpu
