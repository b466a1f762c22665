// Direct convolution in NCHW for kernels of several taps.
//
// A task owns a band of rows of one sample and a piece of the filters. It copies a chunk of
// channels of the band at a time (conv_band.h: the padding written out, the stride's phases apart),
// so that the pixels that one tap reads for a run of outputs are neighbours. Vectors run along
// filters and the pixels of a row are the broadcasts of a register tile: no lane is lost at the end
// of a row, whatever its length, and no tap needs an im2col copy. It is the loop of Georganas et
// al. ("Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", 2018) on
// plain NCHW. A panel of weights stays in the first-level cache for all pixels of the band, while
// the next one is fetched. The sums of a finished panel are transposed in registers on their way
// out.
#include "cpu/band_gemm.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_band.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/band_gemm.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Outputs of a band: at least so many share each panel of weights, and with few filters more share
// the rows above and below.
constexpr int64_t kBandPixels = 16 * kMaxRows;
constexpr int64_t kBandSums = 1024;  // outputs times panels
// A chunk of the band, and the sums of a task: both in the second-level cache.
constexpr int64_t kChunkBytes = 256 << 10;
constexpr int64_t kSumBytes = 384 << 10;
// Enough tasks for several threads where the problem is large.
constexpr int64_t kTasksWanted = 16;

// A block for each column of taps leaves out the pixels whose tap lies beside the image. Its terms
// should be enough for a tile.
constexpr int64_t kColumnTerms = 64;

// The taps of one column, where each gets blocks of its own; else 0.
int64_t column_taps(const ConvView& view) {
  int64_t taps = 0;
  for (const ConvTap& tap : view.taps) taps += tap.w == view.taps[0].w;
  return taps * view.C >= kColumnTerms ? taps : 0;
}

// Where each tap stands once those of a column are together.
std::vector<int64_t> tap_ranks(const ConvView& view) {
  const int64_t taps = static_cast<int64_t>(view.taps.size());
  std::vector<int64_t> order(view.taps.size()), ranks(view.taps.size());
  for (int64_t t = 0; t < taps; ++t) order[t] = t;
  if (column_taps(view) > 0)
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return view.taps[a].w < view.taps[b].w; });
  for (int64_t t = 0; t < taps; ++t) ranks[order[t]] = t;
  return ranks;
}

ConvView ordered(const ConvView& view) {
  ConvView v = view;
  const std::vector<int64_t> ranks = tap_ranks(view);
  for (size_t t = 0; t < ranks.size(); ++t) v.taps[ranks[t]] = view.taps[t];
  return v;
}

// Of an ordered view.
std::vector<ReductionBlock> blocks_of(const ConvView& view) {
  const int64_t all = static_cast<int64_t>(view.taps.size()), taps = column_taps(view);
  std::vector<ReductionBlock> blocks =
      reduction_blocks(view.C, taps > 0 ? taps : all, kBandBlockTerms);
  if (taps == 0) return blocks;
  std::vector<ReductionBlock> split;
  for (size_t first = 0, last = 0; first < blocks.size(); first = last) {
    while (last < blocks.size() && blocks[last].c0 == blocks[first].c0) ++last;
    for (int64_t t = 0; t < all; t += taps)
      for (size_t b = first; b < last; ++b)
        split.push_back({blocks[b].c0, blocks[b].cn, t + blocks[b].t0, blocks[b].tn});
  }
  return split;
}

// Bytes of a chunk of a band, or more than any limit.
int64_t chunk_bytes(const ConvView& view, int64_t channels, int64_t rows, int64_t element_size) {
  ConvView chunk = view;
  chunk.C = channels;
  const BandExtent extent(chunk, true, element_size, kVectorBytes / element_size);
  if (!extent.fits) return INT64_MAX;
  const double elements = extent.row * static_cast<double>(extent.halo + rows);
  return static_cast<int64_t>(std::min(elements, 1e15)) * element_size;
}

// How a sample is cut. No bit depends on it.
struct BandCuts {
  int64_t rows;      // of a band
  int64_t channels;  // of a chunk

  BandCuts(const ConvView& view, int64_t unit, int64_t element_size) {
    const int64_t panels = ceil_div(view.K * element_size, 2 * kVectorBytes);
    const int64_t bands = std::min(view.I, ceil_div(kTasksWanted, view.N * view.groups));
    rows = std::min({view.I, ceil_div(kBandSums, view.J * panels), ceil_div(view.I, bands)});
    rows = std::max(rows, std::min(view.I, ceil_div(kBandPixels, view.J)));
    const auto bytes = [&] { return chunk_bytes(view, channels, rows, element_size); };
    for (;; rows = ceil_div(rows, 2)) {
      channels = view.C;
      while (channels > unit && bytes() > kChunkBytes)
        channels = std::max(unit, round_up(ceil_div(channels, 2), unit));
      if (rows == 1 || bytes() <= kChunkBytes) break;
    }
    rows = ceil_div(view.I, ceil_div(view.I, rows));
  }
};

ConvBand chunk_band(const ConvView& view, const BandCuts& cuts, int64_t element_size) {
  ConvView chunk = view;
  chunk.C = cuts.channels;
  chunk.groups = 1;
  return ConvBand(chunk, true, element_size, kVectorBytes / element_size, cuts.rows);
}

// The panel [tap][channel][width] of each of the blocks that share channels [c0, c0 + cn), from
// `columns` filters at w and padded with zeros to its width. offsets: of each tap's weight; panels:
// where each tap's rows begin. scratch is [taps][width].
template <typename T>
void pack_tap_panels(const ConvView& view, int64_t c0, int64_t cn, const T* w, int64_t columns,
                     int64_t width, const int64_t* offsets, Wide<T>* const* panels,
                     Wide<T>* scratch) {
  const int64_t taps = static_cast<int64_t>(view.taps.size());
  w += c0 * view.weight_c;
  if (view.weight_k == 1) {
    for (int64_t c = 0; c < cn; ++c, w += view.weight_c)
      for (int64_t t = 0; t < taps; ++t) {
        copy_wide(panels[t] + c * width, w + offsets[t], columns);
        fill_zero(panels[t] + c * width + columns, width - columns);
      }
    return;
  }
  if (view.weight_c == 1) {
    for (int64_t t = 0; t < taps; ++t) {
      pack_transposed(w + view.taps[t].weight, view.weight_k, columns, cn, panels[t], width);
      for (int64_t c = 0; c < cn; ++c) fill_zero(panels[t] + c * width + columns, width - columns);
    }
    return;
  }
  fill_zero(scratch, taps * width);
  for (int64_t c = 0; c < cn; ++c, w += view.weight_c) {
    for_weight_runs(offsets, taps, [&](int64_t t, int64_t n) {
      pack_transposed(w + offsets[t], view.weight_k, columns, n, scratch + t * width, width);
    });
    for (int64_t t = 0; t < taps; ++t) copy_wide(panels[t] + c * width, scratch + t * width, width);
  }
}

// The panels of a view's weights, each wherever it belongs.
template <typename T>
class WeightPacker {
 public:
  using A = Wide<T>;
  struct Scratch {
    explicit Scratch(const ConvView& view)
        : taps(static_cast<int64_t>(view.taps.size()) * kPanel<A>), panels(view.taps.size()) {}
    Buffer<A> taps;
    std::vector<A*> panels;  // where each tap's rows begin
  };

  WeightPacker(const ConvView& view, const T* w, A* packed)
      : view_(view),
        w_(w),
        packed_(packed),
        ranks_(tap_ranks(view)),
        blocks_(blocks_of(ordered(view))) {
    for (const ConvTap& tap : view.taps) offsets_.push_back(tap.weight);
  }

  // Of channels whose blocks are packed together, and the terms of one.
  int64_t chunks() const { return ceil_div(view_.C, blocks_[0].cn); }
  int64_t terms_at_once() const { return blocks_[0].cn * static_cast<int64_t>(view_.taps.size()); }

  void pack(int64_t g, int64_t chunk, int64_t panel, Scratch& scratch) const {
    const auto taps = static_cast<int64_t>(view_.taps.size());
    const int64_t filter = panel * kPanel<A>, c0 = chunk * blocks_[0].cn;
    const int64_t padded_k = round_up(view_.K, kLanes<A>);
    const int64_t width = std::min(kPanel<A>, padded_k - filter);
    const int64_t cn = std::min(blocks_[0].cn, view_.C - c0);
    A* block_panel = packed_ + (g * view_.C + c0) * taps * padded_k;
    for (const ReductionBlock& block : blocks_) {
      if (block.c0 != c0) continue;
      for (int64_t t = 0; t < taps; ++t)
        if (ranks_[t] >= block.t0 && ranks_[t] < block.t0 + block.tn)
          scratch.panels[t] =
              block_panel + filter * block.size() + (ranks_[t] - block.t0) * cn * width;
      block_panel += block.size() * padded_k;
    }
    pack_tap_panels(view_, c0, cn, w_ + g * view_.weight_group + filter * view_.weight_k,
                    std::min(kPanel<A>, view_.K - filter), width, offsets_.data(),
                    scratch.panels.data(), scratch.taps.get());
  }

 private:
  const ConvView& view_;
  const T* w_;
  A* packed_;
  const std::vector<int64_t> ranks_;
  const std::vector<ReductionBlock> blocks_;
  std::vector<int64_t> offsets_;
};

template <typename T>
class BandGemm {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = kLanes<A>;

  // packer: of the weights, or null where they are packed.
  BandGemm(const ConvView& view, const T* src, const A* weights, const WeightPacker<T>* packer,
           const T* bias, const Epilogue<T>& epilogue)
      : view_(ordered(view)),
        src_(src),
        weights_(weights),
        packer_(packer),
        epilogue_(epilogue),
        blocks_(blocks_of(view_)),
        cuts_(view_, blocks_[0].cn, sizeof(A)),
        band_(chunk_band(view_, cuts_, sizeof(A))),
        by_columns_(column_taps(view_) > 0),
        padded_k_(round_up(view.K, kL)),
        panels_(ceil_div(view.K, kPanel<A>)),
        bias_(view.groups * padded_k_) {
    fill_zero(bias_.get(), view.groups * padded_k_);
    for (int64_t g = 0; g < view.groups && bias != nullptr; ++g)
      copy_wide(bias_.get() + g * padded_k_, bias + g * view.K, view.K);
    direct_ =
        epilogue.preactivation == nullptr && view.dst.column == 1 &&
        (epilogue.activation == Activation::kNone || epilogue.activation == Activation::kReLU);
    const int64_t taps = static_cast<int64_t>(view.taps.size());
    for (const ReductionBlock& block : blocks_)
      for (int64_t t = block.t0; t < block.t0 + block.tn; ++t)
        for (int64_t c = 0; c < block.cn; ++c)
          offsets_.push_back(band_.offsets[((block.c0 + c) % cuts_.channels) * taps + t]);
    const int64_t tasks = view.N * view.groups * band_.bands;
    const int64_t panel_bytes = band_.band * view.J * kPanel<A> * static_cast<int64_t>(sizeof(A));
    pieces_ = std::max(ceil_div(panels_ * panel_bytes, kSumBytes),
                       std::min(ceil_div(kTasksWanted, tasks), ceil_div(panels_, 2)));
    pieces_ = std::min(pieces_, panels_);
  }

  // Whether a panel meets one band only. Its task then packs it too: to read what another core has
  // written takes several times as long.
  bool tasks_pack() const { return view_.N * band_.bands == 1; }

  void run(const Parallel& pool) const {
    const int64_t tasks = view_.N * view_.groups * band_.bands * pieces_;
    const WorkSplit split(tasks, static_cast<double>(band_.band * view_.J) *
                                     static_cast<double>(ceil_div(view_.K, pieces_)) *
                                     static_cast<double>(view_.terms() + 8));
    const int64_t band_size = round_up(band_.size, 16);
    const int64_t sums_size = ceil_div(panels_, pieces_) * band_.band * view_.J * kPanel<A>;
    Buffer<A> scratch(split.slots * (band_size + sums_size));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* band = scratch.get() + slot * (band_size + sums_size);
      for (int64_t task = begin; task < end; ++task) {
        if (packer_ != nullptr && tasks_pack()) pack_weights(task);
        run_task(task, band, band + band_size);
      }
    });
  }

 private:
  // The lines of the next chunk of the source, a few with each tile: its rows are too short for the
  // hardware's prefetchers.
  class SourceLines {
   public:
    // channel: the next of the task, or its end. tiles: of each block until then.
    void start(const BandGemm& gemm, int64_t task, int64_t channel, int64_t tiles) {
      const ConvView& view = gemm.view_;
      if (channel >= view.C) {
        channel = 0;
        ++task;
      }
      const int64_t outer = task / gemm.pieces_;
      const int64_t i0 = outer % gemm.band_.bands * gemm.band_.band;
      const int64_t n = outer / gemm.band_.bands / view.groups;
      channels_ = n < view.N ? std::min(gemm.cuts_.channels, view.C - channel) : 0;
      const int64_t g = outer / gemm.band_.bands % view.groups;
      const auto rows = std::minmax(view.taps.front().h, view.taps.back().h);
      const int64_t begin = std::max(i0 * view.step_h + rows.first, int64_t{0});
      const int64_t end =
          std::min((i0 + gemm.band_.band - 1) * view.step_h + rows.second + 1, view.H);
      line_ = gemm.src_ + n * view.src.n + (g * view.C + channel) * view.src.c + begin * view.W;
      length_ = std::max((end - begin) * view.W, int64_t{0});
      step_ = view.src.c - length_;
      left_ = length_;
      const int64_t calls = tiles * std::max<int64_t>(1, channels_ / gemm.blocks_[0].cn);
      each_ = ceil_div(channels_ * ceil_div(length_, kLine), calls);
    }
    void fetch() {
      for (int64_t i = 0; i < each_ && channels_ > 0; ++i) {
        __builtin_prefetch(line_, 0, 2);
        line_ += kLine;
        left_ -= kLine;
        if (left_ > 0) continue;
        line_ += step_ + left_;
        left_ = length_;
        --channels_;
      }
    }

   private:
    static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    const T* line_ = nullptr;
    int64_t channels_ = 0, length_ = 0, left_ = 0, step_ = 0, each_ = 0;
  };

  void pack_weights(int64_t task) const {
    const int64_t piece = task % pieces_, g = task / pieces_ / band_.bands % view_.groups;
    typename WeightPacker<T>::Scratch scratch(view_);
    for (int64_t chunk = 0; chunk < packer_->chunks(); ++chunk)
      for (int64_t p = piece * panels_ / pieces_; p < (piece + 1) * panels_ / pieces_; ++p)
        packer_->pack(g, chunk, p, scratch);
  }

  void run_task(int64_t task, A* source, A* sums) const {
    const int64_t piece = task % pieces_, b = task / pieces_ % band_.bands;
    const int64_t g = task / pieces_ / band_.bands % view_.groups;
    const int64_t n = task / pieces_ / band_.bands / view_.groups;
    const int64_t i0 = b * band_.band, rows = std::min(band_.band, view_.I - i0);
    const int64_t first = piece * panels_ / pieces_, last = (piece + 1) * panels_ / pieces_;
    const T* src = src_ + n * view_.src.n + g * view_.C * view_.src.c;
    const A* const group_weights = weights_ + g * view_.terms() * padded_k_;
    const A* weights = group_weights;
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
    ConvView chunk = view_;
    const int64_t row_tiles = ceil_div(view_.J, kMaxRows);
    const int64_t* offsets = offsets_.data();
    // Sums of few terms are through before the lines they go to have come.
    const bool fetches_dst = blocks_.size() == 1;
    SourceLines lines;
    for (size_t at = 0; at < blocks_.size(); ++at) {
      const ReductionBlock& block = blocks_[at];
      if (block.c0 % cuts_.channels == 0 && block.t0 == 0) {
        chunk.C = std::min(cuts_.channels, view_.C - block.c0);
        band_.fill(chunk, src + block.c0 * view_.src.c, 0, i0, source);
        lines.start(*this, task, block.c0 + chunk.C, (last - first) * rows * row_tiles);
      }
      const int64_t depth = block.size();
      for (int64_t panel = first; panel < last; ++panel) {
        const A* w = weights + panel * kPanel<A> * depth;
        // A line a term: the first tiles fetch the panel that follows, in this block, the next or,
        // for the next task, the first.
        const bool turn = panel + 1 == last, again = turn && at + 1 == blocks_.size();
        const A* next = again ? group_weights : turn ? weights + padded_k_ * depth : weights;
        const int64_t next_depth = again  ? blocks_[0].size()
                                   : turn ? blocks_[at + 1].size()
                                          : depth;
        next += (turn ? first : panel + 1) * kPanel<A> * next_depth;
        const A* next_end = next + kPanel<A> * next_depth;
        const int64_t vectors =
            std::min<int64_t>(ceil_div(view_.K - panel * kPanel<A>, kL), kMaxVectors);
        const int64_t width = vectors * kL;
        A* out = sums + (panel - first) * band_.band * view_.J * kPanel<A>;
        const Range columns =
            by_columns_ ? valid_range(view_.J, view_.step_w, view_.taps[block.t0].w, view_.W)
                        : Range{0, view_.J};
        if (at == 0 && columns.size() < view_.J) fill_zero(out, rows * view_.J * kPanel<A>);
        for (int64_t i = 0; i < rows; ++i) {
          // Taps above or below the image are the first or last of the block.
          const Range taps = taps_inside(block, i0 + i);
          const int64_t k0 = taps.begin * block.cn;
          for_row_tiles(columns.size(), [&](int64_t first_pixel, int64_t pixels) {
            const int64_t j = columns.begin + first_pixel;
            const int64_t pixel = i * view_.J + j;
            if (fetches_dst)
              fetch_dst(n, g, panel, (i0 + i) * view_.dst.row + j * view_.dst.column);
            band_microkernel<A>(
                pixels, vectors)({source + i * band_.width + j, offsets + k0, w + k0 * width,
                                  out + pixel * kPanel<A>, taps.size() * block.cn, at > 0, next});
            lines.fetch();
            if (next != w) next += taps.size() * block.cn * kLine;
            if (next != w && next >= next_end) next = w;
          });
        }
        if (at + 1 == blocks_.size()) store(out, n, g, panel, i0, rows);
      }
      weights += padded_k_ * depth;
      offsets += depth;
    }
  }

  // Of the block's taps, those that read a row of the image for output row i. Rows ascend or
  // descend with the taps.
  Range taps_inside(const ReductionBlock& block, int64_t i) const {
    Range range{0, block.tn};
    const auto outside = [&](int64_t t) {
      const int64_t h = i * view_.step_h + view_.taps[block.t0 + t].h;
      return h < 0 || h >= view_.H;
    };
    while (range.begin < range.end && outside(range.begin)) ++range.begin;
    while (range.begin < range.end && outside(range.end - 1)) --range.end;
    return range;
  }

  void fetch_dst(int64_t n, int64_t g, int64_t panel, int64_t pixel) const {
    const int64_t filter = panel * kPanel<A>;
    const T* y = epilogue_.y + view_.dst_offset + n * view_.dst.n +
                 (g * view_.K + filter) * view_.dst.c + pixel;
    for (int64_t f = std::min(view_.K - filter, kPanel<A>); f > 0; --f, y += view_.dst.c)
      __builtin_prefetch(y, 1, 3);
  }

  // The sums of a panel to the destination.
  void store(const A* sums, int64_t n, int64_t g, int64_t panel, int64_t i0, int64_t rows) const {
    const bool whole = view_.dst_pixels_contiguous();
    const int64_t runs = whole ? 1 : rows, length = whole ? rows * view_.J : view_.J;
    const int64_t filter = panel * kPanel<A>, filters = std::min(view_.K - filter, kPanel<A>);
    int64_t dst = view_.dst_offset + n * view_.dst.n + (g * view_.K + filter) * view_.dst.c +
                  i0 * view_.dst.row;
    for (int64_t r = 0; r < runs; ++r, dst += view_.dst.row, sums += length * kPanel<A>)
      for (int64_t p = 0; p < length; p += kL)
        for (int64_t f = 0; f < filters; f += kL)
          store_block(sums + p * kPanel<A> + f, bias_.get() + g * padded_k_ + filter + f,
                      std::min(length - p, kL), std::min(filters - f, kL),
                      dst + f * view_.dst.c + p * view_.dst.column);
  }

  void store_block(const A* sums, const A* bias, int64_t pixels, int64_t filters,
                   int64_t dst) const {
    using V = WideVec<T>;
    using R = Vec<A>;
    const typename R::Type offset = R::load(bias);
    typename R::Type tile[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      tile[i] = i < pixels ? R::load(sums + i * kPanel<A>) + offset : offset;
    transpose_steps<1>(tile);
    if (direct_) {
      if (epilogue_.residual != nullptr) {
        const T* residual = epilogue_.residual + dst;
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          if (i < filters)
            tile[i] += pixels == kL ? V::load(residual + i * view_.dst.c)
                                    : V::load_partial(residual + i * view_.dst.c, pixels);
      }
      if (epilogue_.activation == Activation::kReLU) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          tile[i] = tile[i] < typename R::Type{} ? typename R::Type{} : tile[i];
      }
      T* y = epilogue_.y + dst;
      if (pixels == kL && filters == kL) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) V::store(y + i * view_.dst.c, tile[i]);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          if (i < filters) V::store_partial(y + i * view_.dst.c, tile[i], pixels);
      }
      return;
    }
    A rows[kL * kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) R::store(rows + i * kL, tile[i]);
    for (int64_t i = 0; i < filters; ++i)
      epilogue_.store(rows + i * kL, pixels, dst + i * view_.dst.c, view_.dst.column);
  }

  const ConvView view_;
  const T* src_;
  const A* weights_;
  const WeightPacker<T>* packer_;
  const Epilogue<T>& epilogue_;
  const std::vector<ReductionBlock> blocks_;
  const BandCuts cuts_;
  const ConvBand band_;
  const bool by_columns_;         // a block's taps share a column
  std::vector<int64_t> offsets_;  // [block][tap][channel], in the band
  int64_t padded_k_, panels_, pieces_;
  Buffer<A> bias_;
  bool direct_;
};

}  // namespace

bool band_gemm_applies(const ConvView& view, int64_t element_size) {
  const std::vector<ReductionBlock> blocks = blocks_of(view);
  return !blocks.empty() && chunk_bytes(view, blocks[0].cn, 1, element_size) <= kChunkBytes;
}

template <typename T>
int64_t band_gemm_weights_size(const ConvView& view) {
  return view.groups * view.terms() * round_up(view.K, kLanes<Wide<T>>);
}

template <typename T>
void band_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                            const Parallel& pool) {
  const WeightPacker<T> packer(view, w, packed);
  const int64_t panels = ceil_div(view.K, kPanel<Wide<T>>);
  const WorkSplit split(view.groups * packer.chunks() * panels,
                        4.0 * static_cast<double>(packer.terms_at_once() * kPanel<Wide<T>>));
  parallel_for_with_scratch(pool, 0, split.slots, 1, [&](int64_t first, int64_t last) {
    typename WeightPacker<T>::Scratch scratch(view);
    for (int64_t item = split.begin(first); item < split.begin(last); ++item)
      packer.pack(item / panels / packer.chunks(), item / panels % packer.chunks(), item % panels,
                  scratch);
  });
}

template <typename T>
void band_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed, const T* bias,
               const Epilogue<T>& epilogue, const Parallel& pool) {
  if (packed != nullptr) return BandGemm<T>(view, src, packed, nullptr, bias, epilogue).run(pool);
  Buffer<Wide<T>> own(band_gemm_weights_size<T>(view));
  const WeightPacker<T> packer(view, w, own.get());
  const BandGemm<T> gemm(view, src, own.get(), &packer, bias, epilogue);
  if (!gemm.tasks_pack()) band_gemm_pack_weights(view, w, own.get(), pool);
  gemm.run(pool);
}

#define TORCHCONV_INSTANTIATE(T)                                                              \
  template int64_t band_gemm_weights_size<T>(const ConvView&);                                \
  template void band_gemm_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&); \
  template void band_gemm(const ConvView&, const T*, const T*, const Wide<T>*, const T*,      \
                          const Epilogue<T>&, const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE

}  // namespace torchconv::cpu
