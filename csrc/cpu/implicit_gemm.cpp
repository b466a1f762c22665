// Convolution as a matrix product without an im2col matrix in memory.
//
// The source's channels are neighbours in memory (NHWC). The destination of one sample and group is
// a matrix of pixels by filters, with the vector along filters. A task owns a block of pixels and
// of filters of one sample, and for each reduction block packs its pixels, multiplies them with the
// weights (packed once) and adds to its scratch tile; after the last block the epilogue writes each
// tile while it is in the first-level cache.
// Blocking follows Goto and van de Geijn (2008) and depends on one sample's problem only, so that a
// sample's bits depend neither on the batch nor on the threads.
#include "cpu/implicit_gemm.h"

#include <cstring>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Even cuts of `total` in pieces of at most `limit`, each a multiple of `unit` but the last.
struct Cuts {
  int64_t total, size, count;
  Cuts(int64_t all, int64_t limit, int64_t unit) : total(all) {
    const int64_t pieces = std::max<int64_t>(1, ceil_div(all, std::max(limit, unit)));
    size = std::max(round_up(ceil_div(all, pieces), unit), unit);
    count = ceil_div(all, size);
  }
  int64_t begin(int64_t i) const { return i * size; }
  int64_t length(int64_t i) const { return std::min(size, total - i * size); }
};

// The tasks of one sample and group should be enough for several threads when the sample is large,
// and each should be worth its packing.
constexpr int64_t kTasksWanted = 16;

// The weights of a view, packed: [group][block][panel][depth][width].
template <typename T>
class PackedFilters {
 public:
  using A = Wide<T>;

  explicit PackedFilters(const ConvView& view)
      : view_(view),
        blocks_(reduction_blocks(view.C, static_cast<int64_t>(view.taps.size()), kDepth, false)),
        padded_k_(round_up(view.K, kLanes<A>)) {}

  const std::vector<ReductionBlock>& blocks() const { return blocks_; }
  int64_t padded_k() const { return padded_k_; }
  int64_t size() const { return view_.groups * view_.terms() * padded_k_; }
  // Of a group's block.
  int64_t offset(int64_t g, int64_t block) const {
    int64_t terms = g * view_.terms();
    for (int64_t b = 0; b < block; ++b) terms += blocks_[b].size();
    return terms * padded_k_;
  }

  void pack(const T* w, A* packed, const Parallel& pool) const {
    const int64_t blocks = static_cast<int64_t>(blocks_.size());
    if (blocks == 0) return;
    const int64_t unit = kPanel<A>;
    const int64_t pieces = ceil_div(view_.K, unit);
    const WorkSplit split(view_.groups * blocks * pieces, 4.0 * kDepth * static_cast<double>(unit));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      int64_t offsets[kDepth];
      int64_t planned = -1;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t piece = item % pieces, b = item / pieces % blocks, g = item / pieces / blocks;
        const ReductionBlock& block = blocks_[b];
        if (planned != b) weight_offsets(view_, block, false, offsets);
        planned = b;
        const int64_t k = piece * unit, n = std::min(unit, view_.K - k);
        const T* source = w + g * view_.weight_group + k * view_.weight_k;
        A* to = packed + offset(g, b);
        pack_weight_panel(source, view_.weight_k, offsets, block.size(), n,
                          std::min(unit, padded_k_ - k), to + k * block.size());
      }
    });
  }

 private:
  const ConvView& view_;
  const std::vector<ReductionBlock> blocks_;
  const int64_t padded_k_;
};

template <typename T>
class ImplicitGemm {
 public:
  using A = Wide<T>;

  // packed: the packed weights, or null.
  ImplicitGemm(const ConvView& view, const T* src, const T* w, const A* packed, const T* bias,
               const Epilogue<T>& epilogue)
      : view_(view),
        src_(src),
        w_(w),
        epilogue_(epilogue),
        layout_(view),
        blocks_(layout_.blocks()),
        padded_k_(layout_.padded_k()),
        pixels_(pixel_cuts()),
        filters_(filter_cuts(pixels_.count)),
        own_weights_(packed != nullptr ? 0 : layout_.size()),
        weights_(packed != nullptr ? packed : own_weights_.get()),
        bias_(view.groups * padded_k_) {
    for (int64_t g = 0; g < view.groups; ++g)
      for (int64_t k = 0; k < padded_k_; ++k)
        bias_[g * padded_k_ + k] =
            bias != nullptr && k < view.K ? to_wide(bias[g * view.K + k]) : A{0};
  }

  void run(const Parallel& pool) {
    if (weights_ == own_weights_.get()) layout_.pack(w_, own_weights_.get(), pool);
    const int64_t tasks = view_.N * view_.groups * pixels_.count * filters_.count;
    const WorkSplit split(tasks, static_cast<double>(pixels_.size) *
                                     static_cast<double>(filters_.size) *
                                     static_cast<double>(view_.terms() + 4));
    const int64_t filters = std::min(filters_.size, padded_k_);
    const int64_t panel_size = pixels_.size * kARow<A>;
    const int64_t tile_size = filters * round_up(pixels_.size, kLanes<A>) + kPanel<A>;
    std::vector<std::vector<TapRun>> taps;
    for (const ReductionBlock& block : blocks_) taps.push_back(tap_runs(view_, block));

    Buffer<A> panels(split.slots * round_up(panel_size, 16));
    Buffer<A> tiles(split.slots * round_up(tile_size, 16));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      const Scratch scratch{panels.get() + slot * round_up(panel_size, 16),
                            tiles.get() + slot * round_up(tile_size, 16)};
      for (int64_t task = begin; task < end; ++task) {
        int64_t rest = task;
        Task t;
        const int64_t filter_block = rest % filters_.count;
        rest /= filters_.count;
        const int64_t pixel_block = rest % pixels_.count;
        rest /= pixels_.count;
        t.g = rest % view_.groups;
        t.n = rest / view_.groups;
        t.pixel = pixels_.begin(pixel_block);
        t.pixels = pixels_.length(pixel_block);
        t.filter = filters_.begin(filter_block);
        t.filters = filters_.length(filter_block);
        t.src = src_ + t.n * view_.src.n + t.g * view_.C * view_.src.c;
        t.dst = view_.dst_offset + t.n * view_.dst.n + t.g * view_.K * view_.dst.c;
        run_filter_vectors(t, scratch, taps);
      }
    });
  }

 private:
  struct Task {
    int64_t n, g, pixel, pixels, filter, filters;
    const T* src;
    int64_t dst;  // offset of the sample's group
  };
  struct Scratch {
    A* panels;
    A* tile;
  };

  Cuts pixel_cuts() const {
    // The scratch tile and the packed pixels share the second-level cache with weights.
    const int64_t pixels = view_.pixels();
    const int64_t budget = 32768 / std::max<int64_t>(1, std::min<int64_t>(padded_k_, 512));
    return Cuts(pixels, std::min<int64_t>(std::max<int64_t>(budget, 2 * kMaxRows), 8 * kMaxRows),
                1);
  }

  Cuts filter_cuts(int64_t pixel_blocks) const {
    const int64_t unit = kPanel<A>;
    const int64_t have = pixel_blocks * view_.groups;
    const int64_t pieces =
        std::min(ceil_div(kTasksWanted, std::max<int64_t>(have, 1)), ceil_div(view_.K, 128));
    return Cuts(view_.K,
                std::max<int64_t>(
                    1, std::min<int64_t>(ceil_div(view_.K, std::max<int64_t>(pieces, 1)), 512)),
                unit);
  }

  const A* weights(int64_t g, int64_t block) const { return weights_ + layout_.offset(g, block); }

  // ---- One task.

  void run_filter_vectors(const Task& task, const Scratch& scratch,
                          const std::vector<std::vector<TapRun>>& taps) const {
    const int64_t width = round_up(task.filters, kLanes<A>);
    if (blocks_.empty()) fill_zero(scratch.tile, task.pixels * width);
    const int64_t blocks = std::max<int64_t>(1, static_cast<int64_t>(blocks_.size()));
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t depth = 0;
      const A* panels = nullptr;
      if (!blocks_.empty()) {
        const ReductionBlock& block = blocks_[b];
        depth = block.size();
        panels = weights(task.g, b) + task.filter * depth;
        for (int64_t m = 0; m < task.pixels; ++m)
          pack_channel_row(view_, block, taps[b], task.src + block.c0, (task.pixel + m) / view_.J,
                           (task.pixel + m) % view_.J, scratch.panels + m * kARow<A>);
      }
      for (int64_t column = 0; column < task.filters; column += kPanel<A>) {
        const int64_t filters = std::min(kPanel<A>, task.filters - column);
        const int64_t vectors = ceil_div(filters, kLanes<A>);
        for_row_tiles(task.pixels, [&](int64_t first, int64_t n) {
          A* c = scratch.tile + first * width + column;
          if (depth > 0)
            gemm_microkernel<A>(
                n, vectors)({scratch.panels + first * kARow<A>, panels + column * depth, c, depth,
                             vectors * kLanes<A>, width, b > 0});
          if (b + 1 == blocks)
            store_filter_vectors(task, task.pixel + first, n, task.filter + column, filters, c,
                                 width);
        });
      }
    }
  }

  void store_filter_vectors(const Task& task, int64_t pixel, int64_t pixels, int64_t filter,
                            int64_t filters, A* c, int64_t ldc) const {
    const A* bias = bias_.get() + task.g * padded_k_ + filter;
    for (int64_t m = 0; m < pixels; ++m, c += ldc) {
      const int64_t i = (pixel + m) / view_.J, j = (pixel + m) % view_.J;
      for (int64_t k = 0; k < filters; ++k) c[k] += bias[k];
      epilogue_.store(c, filters,
                      task.dst + i * view_.dst.row + j * view_.dst.column + filter * view_.dst.c,
                      view_.dst.c);
    }
  }

  const ConvView& view_;
  const T* src_;
  const T* w_;
  const Epilogue<T>& epilogue_;
  const PackedFilters<T> layout_;
  const std::vector<ReductionBlock>& blocks_;
  int64_t padded_k_;
  Cuts pixels_, filters_;
  Buffer<A> own_weights_;
  const A* weights_;
  Buffer<A> bias_;
};

}  // namespace

template <typename T>
int64_t implicit_gemm_weights_size(const ConvView& view) {
  return PackedFilters<T>(view).size();
}

template <typename T>
void implicit_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                                const Parallel& pool) {
  PackedFilters<T>(view).pack(w, packed, pool);
}

template <typename T>
void implicit_gemm(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                   const T* bias, const Epilogue<T>& epilogue, const Parallel& pool) {
  ImplicitGemm<T>(view, src, w, packed, bias, epilogue).run(pool);
}

#define TORCHCONV_INSTANTIATE(T)                                                                  \
  template int64_t implicit_gemm_weights_size<T>(const ConvView&);                                \
  template void implicit_gemm_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&); \
  template void implicit_gemm(const ConvView&, const T*, const T*, const Wide<T>*, const T*,      \
                              const Epilogue<T>&, const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE

}  // namespace torchconv::cpu
