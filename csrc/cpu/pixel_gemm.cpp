// Convolution along pixels as a matrix product without an im2col matrix in memory.
//
// The destination of a group is a matrix of filters by pixels, the pixels of all samples in one
// row: a vector may hold pixels of two samples, so a small image wastes no lanes. A task owns a
// block of pixels and of filters. For each reduction block it packs its pixels once, in panels that
// stay in the second-level cache, and multiplies them with the weights, a register tile's filters
// at a time. While it multiplies it fetches the source of its next packing, and the last block's
// tiles go from their registers to the destination wherever their pixels are neighbours there.
// Blocking follows Goto and van de Geijn (2008). How a reduction is cut depends on one sample's
// problem only, and nothing else can change a bit. Weights that few pixels meet are packed by the
// task that owns their filters, a tile at a time, and not kept.
#include "cpu/pixel_gemm.h"

#include <type_traits>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/pixel_gemm.h"
#include "cpu/parallel_range.h"
#include "cpu/pixel_panel.h"

namespace torchconv::cpu {
namespace {

// Enough tasks for several threads where the problem is large.
constexpr int64_t kTasksWanted = 16;
// Many tasks are a multiple of this, so that a few threads have as many each.
constexpr int64_t kEvenTasks = 8;
// Filters below which packing the pixels again would show.
constexpr int64_t kFewestFilters = 64, kFewestFiltersByLanes = 256;
constexpr int64_t kMostFilters = 512;
// Pixels so few that tasks pack weights; and such tasks of a block of pixels, as even for two as
// for four threads.
constexpr int64_t kFewPixels = 448, kOwners = 4;
// The packed pixels of a task, beside the sums and the weights in the second-level cache.
constexpr int64_t kPanelBytes = 256 << 10;

std::vector<ReductionBlock> blocks_of(const ConvView& view) {
  return reduction_blocks(view.C, static_cast<int64_t>(view.taps.size()), kDepth);
}

// Filters [begin, end) of tile t: even tiles of at most kMaxRows.
struct FilterTiles {
  int64_t filters, count;
  explicit FilterTiles(int64_t K) : filters(K), count(ceil_div(K, kMaxRows)) {}
  int64_t begin(int64_t t) const { return t * (filters / count) + std::min(t, filters % count); }
};

// dst[i] = src[i], past the caches but for its ends.
template <typename A>
void stream_copy(A* dst, const A* src, int64_t n) {
  using V = Vec<A>;
  int64_t i = 0;
  while (i < n && reinterpret_cast<uintptr_t>(dst + i) % sizeof(typename V::Type) != 0) {
    dst[i] = src[i];
    ++i;
  }
  for (; i + V::kLanes <= n; i += V::kLanes) stream_bytes(dst + i, V::load(src + i));
  for (; i < n; ++i) dst[i] = src[i];
}

template <typename T>
class PixelGemm {
 public:
  using A = Wide<T>;

  // weights: packed, or null where pixel_gemm_packs_along, from those at w.
  PixelGemm(const ConvView& view, const T* src, const A* weights, const T* w, const T* bias,
            const Epilogue<T>& epilogue)
      : view_(flat_pixels(view)),
        src_(src),
        weights_(weights),
        w_(w),
        epilogue_(epilogue),
        blocks_(blocks_of(view_)),
        tiles_(view_.K),
        bias_(bias != nullptr ? view_.groups * view_.K : 0) {
    if (bias != nullptr) copy_wide(bias_.get(), bias, view_.groups * view_.K);
    has_bias_ = bias != nullptr;
    in_place_ = std::is_same_v<T, A> && view_.I == 1 && blocks_.size() > 0 &&
                view_.taps.size() == 1 && view_.step_w == 1 && view_.taps[0].w == 0 &&
                view_.taps[0].h == 0 && view_.J <= view_.W;
    whole_ = view_.dst_pixels_contiguous();
    direct_ = std::is_same_v<T, A> && whole_ && epilogue.preactivation == nullptr &&
              epilogue.clamps_at_most();
    for (const ReductionBlock& block : blocks_) {
      depth_ = std::max(depth_, block.size());
      most_taps_ = std::max(most_taps_, block.tn);
    }
    cut();
  }

  void run(const Parallel& pool) {
    const int64_t tasks = view_.groups * pixel_blocks_ * filter_blocks_;
    const WorkSplit split(tasks, static_cast<double>(panels_ * kPanel<A>) *
                                     static_cast<double>(ceil_div(view_.K, filter_blocks_)) *
                                     static_cast<double>(view_.terms() + 4));
    const int64_t packed = round_up(panels_ * depth_ * kPanel<A>, 16);
    const int64_t tiles = ceil_div(tiles_.count, filter_blocks_);
    const int64_t sums = (blocks_.size() > 1 ? tiles * panels_ : 1) * kTile;
    const int64_t runs = max_pixel_runs(kPanel<A>, view_.J);
    const int64_t plan =
        max_pixel_plan(most_taps_, kMaxVectors, runs) * (most_taps_ == 1 ? panels_ : 1);
    const int64_t slot_size = packed + sums + (weights_ == nullptr ? kMaxRows * kDepth : 0);
    Buffer<A> scratch(split.slots * slot_size);
    Buffer<LaneCopy> plans(split.slots * plan);
    Buffer<PixelRun> run_lists(split.slots * runs);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* panels = scratch.get() + slot * slot_size;
      const Scratch s{panels, panels + packed, panels + packed + sums, plans.get() + slot * plan,
                      run_lists.get() + slot * runs};
      for (int64_t task = begin; task < end; ++task) run_task(task, s);
    });
  }

 private:
  static constexpr int64_t kTile = kMaxRows * kPanel<A>;
  struct Scratch {
    A* panels;
    A* sums;
    A* weights;  // of a tile
    LaneCopy* plan;
    PixelRun* runs;
  };

  // Lines of the source that packing will read, one for each channel at a time. Only what lies
  // apart by more than the hardware's prefetchers follow: the rows of a single tap.
  class SourceLines {
   public:
    SourceLines(const PixelGemm& gemm, int64_t pixel, int64_t pixels, const T* src)
        : view_(gemm.view_) {
      if (view_.taps.size() != 1 || pixel >= view_.N * view_.pixels()) return;
      const int64_t row = pixel / view_.J, j = pixel % view_.J, i = row % view_.I;
      rows_ = std::min(view_.I - i, (j + pixels - 1) / view_.J + 1);
      first_ = rows_ == 1 ? j * view_.step_w : 0;
      length_ = rows_ == 1 ? pixels * view_.step_w : view_.W;
      line_ = src + row / view_.I * view_.src.n +
              (i * view_.step_h + view_.taps[0].h) * view_.src.row + view_.taps[0].w;
    }
    void take(PixelTile<A>* tile) {
      tile->next = tile->a;
      if (rows_ == 0) return;
      tile->next = line_ + first_ + at_;
      tile->next_step = view_.src.c * static_cast<int64_t>(sizeof(T));
      at_ += 64 / static_cast<int64_t>(sizeof(T));
      if (at_ < length_) return;
      at_ = 0;
      line_ += view_.step_h * view_.src.row;
      --rows_;
    }

   private:
    const ConvView& view_;
    const T* line_ = nullptr;
    int64_t rows_ = 0, first_ = 0, length_ = 0, at_ = 0;
  };

  // What a task's plan is of: with a single panel, the same taps of other channels need no other.
  struct Planned {
    int64_t t0 = 0, tn = 0, size = 0;
    bool is_of(const ReductionBlock& block) const {
      return size > 0 && t0 == block.t0 && tn == block.tn;
    }
  };

  // The block's channels of a task's panels.
  void pack(const ReductionBlock& block, const T* src, int64_t pixel, int64_t pixels, A* panels,
            const Scratch& s, Planned* known) const {
    if (pixels <= kPanel<A> && known->is_of(block))
      return pack_pixel_panels(view_, block, src, s.plan, known->size, panels);
    int64_t planned = 0;
    for (int64_t at = 0; at < pixels; at += kPanel<A>) {
      const int64_t count = std::min(kPanel<A>, pixels - at);
      const int64_t runs = pixel_runs(view_, pixel + at, count, s.runs);
      planned += plan_pixel_panel<A>(view_, block, s.runs, runs, ceil_div(count, kLanes<A>),
                                     at * block.size(), s.plan + planned);
      // A channel is read through at once where its plan is short.
      if (block.tn > 1 || at + kPanel<A> >= pixels) {
        pack_pixel_panels(view_, block, src, s.plan, planned, panels);
        *known = {block.t0, block.tn, planned};
        planned = 0;
      }
    }
  }

  void cut() {
    const int64_t panels = ceil_div(view_.N * view_.pixels(), kPanel<A>);
    const int64_t panel_bytes =
        std::max<int64_t>(depth_, 1) * kPanel<A> * static_cast<int64_t>(sizeof(A));
    const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(kPanelBytes / panel_bytes, 32));
    pixel_panels_ = panels;
    if (weights_ == nullptr) {
      // Weights are packed again for each block of pixels.
      pixel_blocks_ = ceil_div(panels, 2 * limit);
      panels_ = ceil_div(panels, pixel_blocks_);
      filter_blocks_ = std::max(kOwners, ceil_div(view_.K, kMostFilters));
      return;
    }
    const int64_t wanted = std::max<int64_t>(1, kTasksWanted / view_.groups);
    pixel_blocks_ = std::max(ceil_div(panels, limit), std::min(panels, wanted));
    if (pixel_blocks_ > kEvenTasks)
      pixel_blocks_ = std::min(panels, round_up(pixel_blocks_, kEvenTasks));
    panels_ = ceil_div(panels, pixel_blocks_);
    const int64_t fewest = copies_lanes(view_) ? kFewestFiltersByLanes : kFewestFilters;
    const int64_t affordable = std::max<int64_t>(1, view_.K / fewest);
    filter_blocks_ = std::max(std::min(ceil_div(wanted, pixel_blocks_), affordable),
                              ceil_div(view_.K, kMostFilters));
  }

  void run_task(int64_t task, const Scratch& s) const {
    const int64_t f = task % filter_blocks_, p = task / filter_blocks_ % pixel_blocks_;
    const int64_t g = task / filter_blocks_ / pixel_blocks_;
    const int64_t first_tile = f * tiles_.count / filter_blocks_;
    const int64_t tiles = (f + 1) * tiles_.count / filter_blocks_ - first_tile;
    const int64_t pixel = p * pixel_panels_ / pixel_blocks_ * kPanel<A>;
    const int64_t end = (p + 1) * pixel_panels_ / pixel_blocks_ * kPanel<A>;
    const int64_t pixels = std::min(view_.N * view_.pixels(), end) - pixel;
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    const T* src = src_ + g * view_.C * view_.src.c;
    int64_t terms = 0, offsets[kDepth];
    Planned planned;
    for (int64_t b = 0; b < std::max<int64_t>(blocks, 1); ++b) {
      const ReductionBlock block = blocks > 0 ? blocks_[b] : ReductionBlock{0, 0, 0, 0};
      const int64_t depth = block.size();
      if (depth > 0 && !in_place_)
        pack(block, src + block.c0 * view_.src.c, pixel, pixels, s.panels, s, &planned);
      if (weights_ == nullptr) weight_offsets(view_, block, offsets);
      // The next packing: the same pixels of other channels, or the next task's.
      const bool last = b + 1 >= blocks;
      SourceLines next(*this, last ? pixel + pixels : pixel, pixels,
                       src + (last ? 0 : blocks_[b + 1].c0) * view_.src.c);
      for (int64_t t = first_tile; t < first_tile + tiles; ++t) {
        const int64_t filter = tiles_.begin(t), rows = tiles_.begin(t + 1) - filter;
        const A* weights = s.weights;
        if (weights_ != nullptr) {
          weights = weights_ + (g * view_.terms() + terms) * view_.K + filter * depth;
        } else {
          pack_weight_panel(w_ + g * view_.weight_group + filter * view_.weight_k, view_.weight_k,
                            offsets, depth, rows, rows, s.weights);
        }
        for (int64_t at = 0; at < pixels; at += kPanel<A>) {
          const int64_t count = std::min(kPanel<A>, pixels - at);
          const int64_t vectors = ceil_div(count, kLanes<A>);
          A* sums = s.sums;
          if (blocks > 1) sums += ((t - first_tile) * panels_ + at / kPanel<A>)*kTile;
          PixelTile<A> tile{};
          tile.a = weights;
          tile.b = s.panels + at * depth;
          tile.depth = depth;
          if (b > 0) tile.sums = sums;
          tile.out = sums;
          tile.out_step = kPanel<A>;
          tile.columns = vectors * kLanes<A>;
          auto kernel = pixel_microkernel<A>(rows, vectors);
          if constexpr (std::is_same_v<T, A>) {
            if (in_place_ && t == first_tile) {
              const int64_t n = (pixel + at) / view_.pixels(), j = pixel + at - n * view_.pixels();
              if (count == kPanel<A> && j + count <= view_.pixels()) {
                kernel = packing_pixel_microkernel<A>(rows);
                tile.source = src + block.c0 * view_.src.c + n * view_.src.n + j;
                tile.source_step = view_.src.c;
              } else {
                Planned apart;  // other pixels
                pack(block, src + block.c0 * view_.src.c, pixel + at, count, s.panels + at * depth,
                     s, &apart);
              }
            }
          }
          next.take(&tile);
          if (weights_ == nullptr && offsets[depth - 1] - offsets[0] == depth - 1)
            fetch_weights(w_ + g * view_.weight_group + offsets[0], depth, filter + rows,
                          at / kPanel<A>, ceil_div(pixels, kPanel<A>));
          if (last)
            finish(kernel, tile, g * view_.K + filter, rows, pixel + at, count, s.runs);
          else
            kernel(tile);
        }
      }
      terms += depth;
    }
  }

  // Asks for a part of what the tile of filters from `filter` on packs, whose terms are neighbours.
  void fetch_weights(const T* w, int64_t depth, int64_t filter, int64_t part, int64_t parts) const {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t rows = std::min<int64_t>(kMaxRows, view_.K - filter);
    for (int64_t m = part * rows / parts; m < (part + 1) * rows / parts; ++m)
      for (int64_t i = 0; i < depth; i += kLine)
        __builtin_prefetch(w + (filter + m) * view_.weight_k + i, 0, 2);
  }

  // The last block: to the destination, from registers or by way of the sums.
  void finish(PixelMicrokernel<A> kernel, PixelTile<A>& tile, int64_t filter, int64_t rows,
              int64_t pixel, int64_t count, PixelRun* runs) const {
    if (has_bias_) tile.bias = bias_.get() + filter;
    const int64_t dst = view_.dst_offset + filter * view_.dst.c;
    const int64_t n = pixel / view_.pixels(), first = pixel - n * view_.pixels();
    if constexpr (std::is_same_v<T, A>) {
      if (direct_ && first + count <= view_.pixels()) {
        tile.clamps = epilogue_.clamps();
        tile.most = epilogue_.most();
        tile.out = epilogue_.y + dst + n * view_.dst.n + first;
        tile.out_step = view_.dst.c;
        if (epilogue_.residual != nullptr)
          tile.residual = epilogue_.residual + (tile.out - epilogue_.y);
        tile.columns = count;
        return kernel(tile);
      }
    }
    kernel(tile);
    if (whole_ && first + count <= view_.pixels()) {
      for (int64_t m = 0; m < rows; ++m)
        epilogue_.store(tile.out + m * kPanel<A>, count,
                        dst + n * view_.dst.n + m * view_.dst.c + first, 1);
      return;
    }
    const int64_t run_count = pixel_runs(view_, pixel, count, runs);
    for (int64_t r = 0; r < run_count; ++r) {
      const PixelRun& run = runs[r];
      const int64_t to =
          dst + run.n * view_.dst.n + run.i * view_.dst.row + run.j * view_.dst.column;
      for (int64_t m = 0; m < rows; ++m)
        epilogue_.store(tile.out + m * kPanel<A> + run.lane, run.count, to + m * view_.dst.c,
                        view_.dst.column);
    }
  }

  const ConvView view_;
  const T* src_;
  const A* weights_;
  const T* w_;
  const Epilogue<T>& epilogue_;
  std::vector<ReductionBlock> blocks_;
  FilterTiles tiles_;
  Buffer<A> bias_;
  bool has_bias_, whole_, direct_;
  bool in_place_;  // the source's rows are rows of panels
  int64_t depth_ = 0, most_taps_ = 0;
  int64_t pixel_panels_, pixel_blocks_, filter_blocks_;
  int64_t panels_;  // of a task, at most
};

}  // namespace

bool pixel_gemm_packs_along(const ConvView& view) {
  // Every owner packs the pixels, too.
  const int64_t most = copies_lanes(view) ? std::min(kFewPixels, view.K / 2) : kFewPixels;
  return view.N * view.pixels() <= most && view.K >= kFewestFilters && view.terms() > 0;
}

int64_t pixel_gemm_weights_size(const ConvView& view) {
  return view.groups * view.K * view.terms();
}

template <typename T>
void pixel_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                             const Parallel& pool) {
  const std::vector<ReductionBlock> blocks = blocks_of(view);
  const FilterTiles tiles(view.K);
  const int64_t count = static_cast<int64_t>(blocks.size());
  const WorkSplit split(view.groups * count * tiles.count,
                        kPackingOperations * static_cast<double>(kDepth * kMaxRows));
  parallel_for_with_scratch(pool, 0, split.slots, 1, [&](int64_t first, int64_t last) {
    // Whoever packs everything will also read everything.
    const bool alone = split.slots > 1 && first == 0 && last == split.slots;
    const bool streams = !alone && shared_by_threads(view);
    int64_t offsets[kDepth];
    alignas(64) Wide<T> panel[kDepth * kMaxRows];
    for (int64_t item = split.begin(first); item < split.begin(last); ++item) {
      const int64_t t = item % tiles.count, b = item / tiles.count % count;
      const int64_t g = item / tiles.count / count;
      if (item == split.begin(first) || t == 0) weight_offsets(view, blocks[b], offsets);
      int64_t terms = g * view.terms();
      for (int64_t i = 0; i < b; ++i) terms += blocks[i].size();
      const int64_t filter = tiles.begin(t), rows = tiles.begin(t + 1) - filter;
      const int64_t depth = blocks[b].size();
      Wide<T>* const to = packed + terms * view.K + filter * depth;
      pack_weight_panel(w + g * view.weight_group + filter * view.weight_k, view.weight_k, offsets,
                        depth, rows, rows, streams ? panel : to);
      if (streams) stream_copy(to, panel, rows * depth);
    }
    if (streams) stream_fence();
  });
}

template <typename T>
void pixel_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  const bool packs = packed == nullptr && !pixel_gemm_packs_along(view);
  Buffer<Wide<T>> own(packs ? pixel_gemm_weights_size(view) : 0);
  if (packs) pixel_gemm_pack_weights(view, w, own.get(), pool);
  PixelGemm<T>(view, src, packs ? own.get() : packed, w, bias, epilogue).run(pool);
}

#define TORCHCONV_INSTANTIATE(T)                                                               \
  template void pixel_gemm_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&); \
  template void pixel_gemm(const ConvView&, const T*, const T*, const Wide<T>*, const T*,      \
                           const Epilogue<T>&, const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE

}  // namespace torchconv::cpu
