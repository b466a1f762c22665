// The tasks of direct_gemm: which pixels and filters each owns, in which order it takes the pixels,
// and which terms of the reduction they read. Of shapes alone, so that all element types share it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/buffer.h"
#include "cpu/axis_groups.h"
#include "cpu/conv_view.h"
#include "cpu/direct_plan.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {

// A block of pixels and filters of a group.
struct DirectPosition {
  Range n, i, j, k;
  int64_t g;
  int64_t pixels() const { return n.size() * i.size() * j.size(); }
};
// Pixels [begin, end) of the task's list, and what they read. From the first on each `even` of them
// lie evenly apart, in both images.
struct DirectPixels {
  Range pixels, rows, columns;
  int64_t even, segments, terms;
};
struct DirectTask {
  DirectPosition at;
  int64_t *src_offsets, *dst_offsets, *scratch_offsets;  // [pixels]
  int64_t pixel_step;  // from an output of a row to the next, as in src_offsets
  std::vector<DirectPixels> groups;
  std::vector<TermSegment> segments;
  SourcePrefetch ahead;  // of what is copied next
};

// What the source is beside its view of terms.
struct DirectSource {
  const void* first;
  int64_t element_size, channels;
  int64_t term_channels = 1;          // 2: a term is a pair, see channel_pairs.h
  const ConvView* rows_of = nullptr;  // or the image whose rows of pixels are pairs: row_pairs.h
};

class DirectTasks {
 public:
  // view: of terms, but for the strides. panel: filters in one. cut: the multiples of filters that
  // a task may begin with, which are vectors or halves of them where that may be inside of a panel.
  // joins: the last panel costs less together with the one before it.
  DirectTasks(const ConvView& view, const DirectPlan& plan, const DirectSource& source,
              int64_t panel, int64_t cut, bool joins);
  // The same ones with the source there.
  DirectTasks(const DirectTasks& planned, const void* first) : DirectTasks(planned) {
    source_.first = first;
  }

  // The first filters of the pieces that a block's tasks take.
  std::vector<int64_t> cuts() const;

 protected:
  // Of a group's pixels.
  int64_t blocks() const { return blocks_n_ * blocks_i_ * blocks_j_; }
  int64_t count() const { return blocks() * view_.groups * filter_pieces_; }
  DirectPosition position(int64_t task) const;
  Range filters_of(int64_t piece) const;
  // Whether pixels in this order are those of another position.
  static bool same_pixels(const DirectPosition& a, const DirectPosition& b);
  // Whether they are also of the same samples and group.
  static bool same_source(const DirectPosition& a, const DirectPosition& b);
  // Lists the task's pixels, those that read through the same taps together. Planes are stored from
  // scratch where pixels lie in the image's order, in runs as long as there are.
  void order_pixels(DirectTask& t) const;
  // The terms of a chunk that each group of pixels reads, cut where sums go from registers to
  // memory: at the same places whatever is left out, so that this changes no bit.
  void cut_segments(DirectTask& t, int64_t channels) const;
  // What a chunk's band copies.
  void add_source(const DirectPosition& at, int64_t chunk, SourcePrefetch* ahead) const;

  // Of the chunk's first element in sample at.n.begin.
  int64_t source_offset(const DirectPosition& at, int64_t chunk) const {
    return at.n.begin * view_.src.n + at.g * source_.channels * view_.src.c +
           chunk * plan_.channels * source_.term_channels * view_.src.c;
  }
  // Of the task's first pixel.
  int64_t dst_offset(const DirectPosition& at) const {
    return view_.dst_offset + at.n.begin * view_.dst.n + at.g * view_.K * view_.dst.c +
           at.i.begin * view_.dst.row + at.j.begin * view_.dst.column;
  }
  // The rows of a tile in different sets of the first-level cache.
  int64_t scratch_ld() const { return round_up(filters_, 32) + 16; }

  const ConvView& view_;
  const DirectPlan& plan_;
  DirectSource source_;
  int64_t taps_, blocks_i_, blocks_j_, blocks_n_;
  int64_t unit_, units_, filter_pieces_;  // units: filters that stay together
  int64_t filters_;                       // of a task, at most
  // Of a full chunk and of the last, as offsets from a pixel's first.
  const int32_t* terms() const { return tables_->terms.get(); }

 private:
  // Of a tap's offsets among the distinct ones of their axis.
  struct TapRank {
    int64_t row, column;
  };
  using BlockGroups = std::vector<std::vector<AxisGroup>>;  // [block]

  struct Tables {
    Buffer<int32_t> terms;
    BlockGroups row_groups;
    std::vector<BlockGroups> column_groups;  // of at least 1, 2, ...; or of any number
    std::vector<TapRank> ranks;  // [tap], or empty where every pixel reads through every tap
  };

  void fill_terms(int64_t channels, int32_t* terms) const;
  void group_pixels(Tables* tables) const;

  std::shared_ptr<const Tables> tables_;
};

// to[l] = first + l*step
void fill_steps(int64_t* to, int64_t n, int64_t first, int64_t step);

}  // namespace torchconv::cpu
