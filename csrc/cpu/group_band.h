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
// Those of equal count are neighbours, and of these the ones below each other, from the top.
std::vector<GroupRun> group_runs(const ConvView& view);

// Part of an image: `channels` of a vector, rows [h, h + rows) and columns [w, w + columns), zero
// outside H x W.
struct GroupWindow {
  ConvStrides strides;
  int64_t channels, H, W, h, rows, w, columns;
  int64_t ahead;  // from a pixel to one that will be read later
};

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
  // Whether vectors of results are full, and begin at a multiple of their length.
  bool whole_vectors(const ConvView& view) const {
    return vector_filters == lanes && groups * view.K % lanes == 0;
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

  // src: the sample. i0: the band's first row of outputs.
  template <typename T, bool kPairs = false>
  void fill(const ConvView& view, const T* src, int64_t block, int64_t i0, Wide<T>* scratch) const;
  // What that reads, to be asked for.
  template <typename T, bool kPairs = false>
  void expect(const ConvView& view, const T* src, int64_t block, int64_t i0,
              SourcePrefetch& ahead) const {
    const int64_t group = view.C * (kPairs ? 2 : 1), first = i0 * view.step_h + first_h;
    const Range inside{std::clamp<int64_t>(first, 0, view.H),
                       std::clamp<int64_t>(first + rows, 0, view.H)};
    prefetch_planes(src + inside.begin * view.src.row + block * groups * group * view.src.c,
                    view.src, groups_in(view, block) * group, inside.size(), view.W, ahead);
  }
};

// Task `task` of N * bands * blocks, in an order in which neighbours read neighbouring memory: in
// channels_last the blocks of a band, unless by_block, else the bands and samples of a block.
struct GroupTask {
  int64_t n, band, block;

  GroupTask(const GroupBand& cut, const ConvView& view, int64_t task, bool by_block = false) {
    const bool inner = view.src.c == 1 && !by_block;
    const int64_t blocks = inner ? cut.blocks : 1;
    block = inner ? task % blocks : task / (view.N * cut.bands);
    band = task / blocks % cut.bands;
    n = task / (blocks * cut.bands) % view.N;
  }
};

// to[row][column][lanes] from src, the image's first of these channels. kPairs: a pair of channels
// is one where pixels are neighbours; else pairs are elements already.
template <typename T, bool kPairs = false>
void copy_group_window(const GroupWindow& window, const T* src, Wide<T>* to);

}  // namespace torchconv::cpu
