// Few products for each pixel do not repay a copy of it: a band of rows (conv_band.h), a packed
// panel (pixel_gemm.h). Here a task is some rows of outputs. A tile loads every tap of its pixels
// from the planes, those beside the image as zeros, and leaves out taps above and below it. A few
// channels are read through at once, row after row, as the hardware foresees; the sums of the rows
// wait for the next ones.
#include "cpu/plane_taps.h"

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/microkernels/plane_taps.h"
#include "cpu/parallel_range.h"
#include "cpu/thread_copies.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kL = kLanes<float>;
// Packed weights, which are read again for every tile.
constexpr int64_t kWeightBytes = 16 << 10;
// Channels that are read together: planes of many sizes fall into the same sets of a cache.
constexpr int64_t kChannels = 16;
// Tiles from one to the one whose last row is asked for: what memory takes to answer.
constexpr int64_t kAhead = 2;
// What the sums of several rows take of the second-level cache.
constexpr int64_t kSumBytes = 256 << 10;

class PlaneTaps {
 public:
  PlaneTaps(const ConvView& view, const float* src, const float* w, const float* bias,
            const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        w_(w),
        bias_(bias),
        epilogue_(epilogue.at(view.dst_offset)),
        taps_(view.taps),
        filter_tiles_(ceil_div(view.K, int64_t{kPlaneFilters})),
        channel_blocks_(ceil_div(
            view.C,
            std::clamp<int64_t>(kDepth / static_cast<int64_t>(view.taps.size()), 1, kChannels))),
        activates_(epilogue.preactivation != nullptr || !epilogue.clamps_at_most()),
        // A stride's dgrad has rows between those of the view, of planes with any number of them.
        streams_(!activates_ && view.dst.c % kL == 0 &&
                 WideVec<float>::streams(epilogue_.y, view.N * view.dst.n, view.dst.row)) {
    std::sort(taps_.begin(), taps_.end(), [](const ConvTap& a, const ConvTap& b) {
      return a.h != b.h ? a.h < b.h : a.w < b.w;
    });
    for (const ConvTap& tap : taps_) offsets_.push_back(tap.h * view.src.row + tap.w);
    cut_columns();
    row_sums_ = static_cast<int64_t>(columns_.size()) * filter_tiles_ * kPlaneSums * kL;
    band_ = channel_blocks_ == 1
                ? view.I
                : std::max<int64_t>(1, kSumBytes / static_cast<int64_t>(sizeof(float)) / row_sums_);
  }

  void run(const Parallel& pool) const {
    const ThreadCopies copies;
    const WorkSplit split(view_.N * view_.I, static_cast<double>(view_.J * view_.K) *
                                                 static_cast<double>(view_.terms() + 4));
    Buffer<float> sums(channel_blocks_ > 1 ? split.slots * band_ * row_sums_ : 0);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      const float* const packed =
          copies.get<float>((view_.terms() + 1) * view_.K, [&](float* to) { pack(to); });
      for (int64_t row = begin; row < end;) {
        const int64_t n = row / view_.I, i = row % view_.I;
        const int64_t rows = std::min({end - row, view_.I - i, band_});
        for (int64_t block = 0; block < channel_blocks_; ++block)
          for (int64_t r = 0; r < rows; ++r)
            compute_row(n, i + r, block, packed, sums.get() + (slot * band_ + r) * row_sums_);
        row += rows;
      }
      if (streams_) stream_fence();
    });
  }

 private:
  // Some vectors of a row of outputs.
  struct Columns {
    int64_t j, vectors, count;
    bool at_edge;                    // reads beside the image, or is no whole vectors
    std::vector<PlaneLanes> inside;  // [tap][vector]
    std::vector<PlaneLanes> lanes;   // [vector]
  };

  // The filters of tile t, which are even.
  Range filters(int64_t t) const {
    return {t * view_.K / filter_tiles_, (t + 1) * view_.K / filter_tiles_};
  }

  void cut_columns() {
    const auto [left, right] = std::minmax_element(
        taps_.begin(), taps_.end(), [](const ConvTap& a, const ConvTap& b) { return a.w < b.w; });
    const int64_t first_w = left->w, last_w = right->w;
    const int64_t most = plane_vectors(ceil_div(view_.K, filter_tiles_));
    const auto add = [&](Range vectors, bool at_edge) {
      const int64_t blocks = ceil_div(vectors.size(), most);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t v = vectors.begin + b * vectors.size() / blocks;
        Columns columns{
            v * kL, vectors.begin + (b + 1) * vectors.size() / blocks - v, 0, at_edge, {}, {}};
        columns.count = std::min(columns.vectors * kL, view_.J - columns.j);
        if (at_edge) {
          for (const ConvTap& tap : taps_)
            for (int64_t l = 0; l < columns.vectors; ++l) {
              const int64_t from = columns.j + l * kL + tap.w;
              columns.inside.push_back(PlaneLanes::of(-from, view_.W - from));
            }
          for (int64_t l = 0; l < columns.vectors; ++l)
            columns.lanes.push_back(PlaneLanes::of(0, columns.count - l * kL));
        }
        columns_.push_back(std::move(columns));
      }
    };
    const int64_t vectors = ceil_div(view_.J, kL);
    // Those all of whose lanes are written, and read inside the image.
    Range whole{ceil_div(std::max<int64_t>(-first_w, 0), kL),
                std::min(view_.J, std::max<int64_t>(view_.W - last_w, 0)) / kL};
    whole.begin = std::min(whole.begin, vectors);
    whole.end = std::clamp(whole.end, whole.begin, vectors);
    // A tile that is nearly full at the edge is better than two.
    if (vectors <= most && whole.size() < vectors) whole = {vectors, vectors};
    add({0, whole.begin}, true);
    add(whole, false);
    add({whole.end, vectors}, true);
  }

  // [filter tile][channel][tap][filter], and the bias behind them.
  void pack(float* to) const {
    for (int64_t t = 0; t < filter_tiles_; ++t)
      for (int64_t c = 0; c < view_.C; ++c)
        for (const ConvTap& tap : taps_)
          for (int64_t k = filters(t).begin; k < filters(t).end; ++k)
            *to++ = w_[k * view_.weight_k + c * view_.weight_c + tap.weight];
    if (bias_ != nullptr)
      std::copy_n(bias_, view_.K, to);
    else
      std::fill_n(to, view_.K, 0.0f);
  }

  // sums: of the row, where the channels are in several blocks.
  void compute_row(int64_t n, int64_t i, int64_t block, const float* packed, float* sums) const {
    const int64_t h = i * view_.step_h;
    Range taps{0, static_cast<int64_t>(taps_.size())};
    while (!taps.empty() && h + taps_[taps.begin].h < 0) ++taps.begin;
    while (!taps.empty() && h + taps_[taps.end - 1].h >= view_.H) --taps.end;
    const Epilogue<float> row = epilogue_.at(n * view_.dst.n + i * view_.dst.row);
    const int64_t c = block * view_.C / channel_blocks_;
    const bool first = block == 0, last = block + 1 == channel_blocks_;
    PlaneTile tile{};
    tile.channels = (block + 1) * view_.C / channel_blocks_ - c;
    tile.channel_step = view_.src.c;
    tile.offsets = offsets_.data() + taps.begin;
    tile.taps = taps.size();
    tile.clamp = last && !activates_ && epilogue_.clamps();
    tile.most = epilogue_.most();
    tile.stream = last && streams_;
    const int64_t below = taps.empty() ? 0 : taps_[taps.end - 1].h * view_.src.row;
    const float* const src = src_ + n * view_.src.n + c * view_.src.c + h * view_.src.row;
    for (const Columns& columns : columns_) {
      tile.src = src + columns.j;
      tile.inside = columns.inside.data() + taps.begin * columns.vectors;
      tile.lanes = columns.lanes.data();
      for (int64_t t = 0; t < filter_tiles_; ++t, sums += kPlaneSums * kL) {
        const Range k = filters(t);
        const Epilogue<float> to = row.at(columns.j + k.begin * view_.dst.c);
        tile.ahead = t > 0 || taps.empty() ? 0 : below + kAhead * columns.vectors * kL;
        tile.channel_w = static_cast<int64_t>(taps_.size()) * k.size();
        tile.w = packed + k.begin * view_.terms() + c * tile.channel_w + taps.begin * k.size();
        tile.bias = first ? packed + view_.K * view_.terms() + k.begin : nullptr;
        tile.before = first ? to.residual : sums;
        tile.before_step = first ? view_.dst.c : columns.vectors * kL;
        tile.out = last ? to.sums() : sums;
        tile.out_step = last ? view_.dst.c : columns.vectors * kL;
        plane_taps_kernel(k.size(), columns.vectors, columns.at_edge)(tile);
        if (!last || !activates_) continue;
        for (int64_t f = 0; f < k.size(); ++f)
          activate(epilogue_.activation, to.sums() + f * view_.dst.c, to.y + f * view_.dst.c,
                   columns.count);
      }
    }
  }

  const ConvView& view_;
  const float* src_;
  const float* w_;
  const float* bias_;
  const Epilogue<float> epilogue_;
  std::vector<ConvTap> taps_;  // row after row
  std::vector<int64_t> offsets_;
  const int64_t filter_tiles_;
  const int64_t channel_blocks_;
  const bool activates_;  // finished rows, beyond what the kernel does
  const bool streams_;
  std::vector<Columns> columns_;
  int64_t band_;      // rows that wait for the next channels
  int64_t row_sums_;  // elements that a row's sums take meanwhile
};

}  // namespace

bool plane_taps_applies(const ConvView& view) {
  return view.groups == 1 && view.src.column == 1 && view.dst.column == 1 && view.step_w == 1 &&
         view.terms() > 0 && static_cast<int64_t>(view.taps.size()) <= kDepth &&
         view.terms() * view.K * static_cast<int64_t>(sizeof(float)) <= kWeightBytes;
}

void plane_taps(const ConvView& view, const float* src, const float* w, const float* bias,
                const Epilogue<float>& epilogue, const Parallel& pool) {
  PlaneTaps(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
