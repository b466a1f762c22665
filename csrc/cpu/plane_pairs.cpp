// See plane_pairs.h. Of the register tile of direct_tile.h rows are filters here, columns pixels
// and terms pairs of channels. A task owns some pixels of a sample and some filters: it zips the
// planes of each two channels to panels [pixels / 32][pair][32], which stay in the second-level
// cache, and multiplies them with the weights, a tile's filters at a time. Tiles round and store
// planes themselves, but where the epilogue needs more than the kernel offers. The reduction is cut
// as in direct_plan.h, by the number of channels only.
#include "cpu/plane_pairs.h"

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "cpu/channel_pairs.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/parallel_range.h"
#include "cpu/source_prefetch.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kL = kLanes<float>, kWidth = kPanel<float>;
// Pairs that are summed in registers, see kDepth.
constexpr int64_t kTermsInRegisters = 1024;
// A task's panels, beside the weights in the second-level cache.
constexpr int64_t kPanelBytes = 256 << 10;
// Enough tasks for several threads, and filters that repay zipping the pixels again.
constexpr int64_t kTasksWanted = 16, kFewestFilters = 64;
// The part of the vectors' lanes that must hold a pixel, in percent.
constexpr int64_t kLanesUsed = 90;

int64_t pairs_of(const ConvView& view) { return ceil_div(view.C, int64_t{2}); }
// The rows of a tile in different sets of a cache.
int64_t row_size(const ConvView& view) { return round_up(pairs_of(view), 32) + 16; }

class PlanePairs {
 public:
  PlanePairs(const ConvView& view, const BFloat16* src, const float* weights, const BFloat16* bias,
             const Epilogue<BFloat16>& epilogue)
      : view_(view),
        src_(src),
        weights_(weights),
        epilogue_(epilogue),
        pixels_(view.pixels()),
        pairs_(pairs_of(view)),
        ld_(row_size(view)),
        bias_(bias != nullptr ? view.groups * view.K * kWidth : 0),
        has_bias_(bias != nullptr),
        terms_(pairs_) {
    if (has_bias_)
      for (int64_t k = 0; k < view.groups * view.K; ++k)
        std::fill_n(bias_.get() + k * kWidth, kWidth, to_wide(bias[k]));
    for (int64_t t = 0; t < pairs_; ++t) terms_[t] = static_cast<int32_t>(t);
    const int64_t step = ceil_div(pairs_, ceil_div(pairs_, kTermsInRegisters));
    for (int64_t t = 0; t < pairs_; t += step) {
      const auto end = static_cast<int32_t>(std::min(t + step, pairs_));
      segments_.push_back({static_cast<int32_t>(t), end, true, end == pairs_});
    }
    for (int64_t m = 0; m < kMaxRows; ++m) {
      weight_rows_[m] = m * ld_;
      scratch_rows_[m] = m * kWidth;
      dst_rows_[m] = m * view.dst.c;
    }
    rounds_ = epilogue.preactivation == nullptr && epilogue.clamps_at_most();

    const int64_t panels = ceil_div(pixels_, kWidth);
    const int64_t most = kPanelBytes / (pairs_ * kWidth * int64_t{sizeof(float)});
    blocks_ = ceil_div(panels, std::max<int64_t>(most, 1));
    block_ = ceil_div(panels, blocks_) * kWidth;
    blocks_ = ceil_div(pixels_, block_);
    const int64_t pieces = std::min(ceil_div(kTasksWanted, view.N * view.groups * blocks_),
                                    std::max<int64_t>(view.K / kFewestFilters, 1));
    filters_ = ceil_div(view.K, pieces);
    pieces_ = ceil_div(view.K, filters_);
  }

  void run(const Parallel& pool) const {
    const int64_t tasks = view_.N * view_.groups * blocks_ * pieces_;
    const WorkSplit split(tasks,
                          static_cast<double>(block_ * filters_) * static_cast<double>(pairs_ + 4));
    const int64_t panels = round_up(block_ * pairs_, 16), slot_size = panels + 2 * kTileSize<float>;
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* const totals = scratch.get() + slot * slot_size;
      float* const block = totals + 2 * kTileSize<float>;
      SourcePrefetch ahead;
      int64_t zipped = -1;  // the block in scratch
      for (int64_t task = begin; task < end; ++task) {
        const Task t = task_at(task);
        if (task / pieces_ != zipped) zip(t, block);
        zipped = task / pieces_;
        ahead.clear();
        if (task + 1 < end && (task + 1) / pieces_ != zipped) {
          const Task next = task_at(task + 1);
          ahead.add(source(next), view_.C, view_.src.c * int64_t{sizeof(BFloat16)},
                    next.pixels.size() * int64_t{sizeof(BFloat16)});
        }
        multiply(t, block, totals, &ahead);
      }
    });
  }

 private:
  struct Task {
    int64_t n, g;
    Range pixels, filters;
  };

  Task task_at(int64_t task) const {
    const auto piece = [](int64_t index, int64_t size, int64_t total) {
      return Range{index * size, std::min((index + 1) * size, total)};
    };
    const int64_t block = task / pieces_, image = block / blocks_;
    return {image / view_.groups, image % view_.groups, piece(block % blocks_, block_, pixels_),
            piece(task % pieces_, filters_, view_.K)};
  }
  const BFloat16* source(const Task& t) const {
    return src_ + t.n * view_.src.n + t.g * view_.C * view_.src.c + t.pixels.begin;
  }

  // [panel][pair][kWidth], or of one vector in the last.
  void zip(const Task& t, float* to) const {
    using Bits = Vec<uint32_t>;
    const BFloat16* const planes = source(t);
    for (int64_t p = 0; p < t.pixels.size(); p += kWidth) {
      const int64_t n = std::min(kWidth, t.pixels.size() - p);
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const BFloat16* even = planes + 2 * pair * view_.src.c + p;
        const BFloat16* odd = 2 * pair + 1 < view_.C ? even + view_.src.c : even;
        const int64_t odds = odd != even ? n : 0;
        for (int64_t i = 0; i < n; i += kL, to += kL)
          Bits::store(to,
                      zip_pairs(even + i, std::min(kL, n - i), odd + i, std::min(kL, odds - i)));
      }
    }
  }

  // scratch: totals and the sums of a tile.
  void multiply(const Task& t, const float* block, float* scratch, SourcePrefetch* ahead) const {
    static constexpr float kZero[kWidth] = {};
    float* const sums = scratch + kTileSize<float>;
    DirectTile<float> tile{};
    tile.terms = terms_.data();
    tile.segments = segments_.data();
    tile.totals = scratch;
    tile.pixels = weight_rows_;
    tile.bias = kZero;
    tile.panels = 1;
    tile.c = sums;
    tile.c_rows = scratch_rows_;
    tile.rounded_rows = dst_rows_;
    tile.clamp = rounds_ && epilogue_.clamps();
    tile.high = epilogue_.most();
    const int64_t panels = ceil_div(t.pixels.size(), kWidth);
    const int64_t lines =
        ceil_div(ahead->lines(), panels * ceil_div(t.filters.size(), int64_t{kMaxRows}));
    tile.next_step = ceil_div(ld_ * kMaxRows * int64_t{sizeof(float)}, panels * pairs_);
    for_row_tiles(t.filters.size(), [&](int64_t first, int64_t rows) {
      const int64_t filter = t.g * view_.K + t.filters.begin + first;
      tile.a = weights_ + filter * ld_;
      tile.before = has_bias_ ? bias_.get() + filter * kWidth : nullptr;
      tile.next = tile.a + rows * ld_;
      for (int64_t panel = 0; panel < panels; ++panel) {
        ahead->ask(lines);
        const int64_t p = panel * kWidth, n = std::min(kWidth, t.pixels.size() - p);
        const int64_t vectors = ceil_div(n, kL);
        tile.b = block + p * pairs_;
        tile.lanes = n - (vectors - 1) * kL;
        const int64_t dst =
            view_.dst_offset + t.n * view_.dst.n + filter * view_.dst.c + t.pixels.begin + p;
        const Epilogue<BFloat16> to = epilogue_.at(dst);
        if (rounds_) tile.rounded = to.y, tile.residual = to.residual;
        direct_pair_microkernel(rows, vectors)(tile);
        tile.next = static_cast<const char*>(tile.next) + tile.next_step * pairs_;
        if (rounds_) continue;
        for (int64_t m = 0; m < rows; ++m)
          epilogue_.store_few(sums + m * kWidth, n, dst + m * view_.dst.c);
      }
    });
  }

  const ConvView& view_;
  const BFloat16* src_;
  const float* weights_;
  const Epilogue<BFloat16>& epilogue_;
  int64_t pixels_, pairs_, ld_;
  int64_t block_, blocks_;    // pixels of a task, and such blocks of a sample
  int64_t filters_, pieces_;  // the same of the filters
  Buffer<float> bias_;        // [filter][kWidth]
  bool has_bias_, rounds_;    // rounds_: the kernel rounds and stores
  std::vector<int32_t> terms_;
  std::vector<TermSegment> segments_;
  int64_t weight_rows_[kMaxRows], scratch_rows_[kMaxRows], dst_rows_[kMaxRows];
};

}  // namespace

bool plane_pairs_applies(const ConvView& view) {
  return takes_pairs(view) && view.taps.size() == 1 && view.taps[0].h == 0 && view.taps[0].w == 0 &&
         view.step_h == 1 && view.step_w == 1 && view.H == view.I && view.W == view.J &&
         view.src.column == 1 && view.src.row == view.W && view.dst_pixels_contiguous() &&
         100 * view.pixels() >= kLanesUsed * round_up(view.pixels(), kL);
}

int64_t plane_pairs_weights_size(const ConvView& view) {
  return view.groups * view.K * row_size(view);
}

void plane_pairs_pack_weights(const ConvView& view, const BFloat16* w, float* packed,
                              const Parallel& pool) {
  // Filters are packed as pixels of channel pairs are.
  const int64_t ld = row_size(view), strips = ceil_div(view.K, kL);
  const WorkSplit split(view.groups * strips,
                        kPackingOperations / 2 * static_cast<double>(kL * view.C));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t g = item / strips, k = item % strips * kL;
      const BFloat16* from = w + g * view.weight_group + k * view.weight_k + view.taps[0].weight;
      const int64_t filters = std::min(kL, view.K - k);
      float* to = packed + (g * view.K + k) * ld;
      if (view.weight_c == 1)
        copy_pairs(from, view.weight_k, filters, view.C, to, ld);
      else
        transpose_pairs(from, view.weight_c, view.weight_k, filters, view.C, to, ld);
    }
  });
}

void plane_pairs(const ConvView& view, const BFloat16* src, const BFloat16* w, const float* packed,
                 const BFloat16* bias, const Epilogue<BFloat16>& epilogue, const Parallel& pool) {
  const Buffer<float> own(packed != nullptr ? 0 : plane_pairs_weights_size(view));
  if (packed == nullptr) plane_pairs_pack_weights(view, w, own.get(), pool);
  PlanePairs(view, src, packed != nullptr ? packed : own.get(), bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
