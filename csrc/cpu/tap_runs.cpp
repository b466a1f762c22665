// First layers: with three channels a tile of the general product would first have its pixels
// copied (direct_gemm.h), and Winograd's transforms take half as long as their products. Here a
// task is a block of rows of outputs. Columns whose taps are all inside the image go through tiles
// of several pixels, those at its edges one by one, with the taps that they have
// (microkernels/tap_run.h). All filters of a tile follow each other, so that what they read is in
// the first-level cache.
#include "cpu/tap_runs.h"

#include <algorithm>
#include <vector>

#include "cpu/axis_groups.h"
#include "cpu/microkernels/tap_run.h"
#include "cpu/parallel_range.h"
#include "cpu/thread_copies.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kL = kLanes<float>, kFilters = kPanel<float>;
// More are neighbours enough for the general product.
constexpr int64_t kMostChannels = 4;

bool are_neighbours(const std::vector<int64_t>& offsets) {
  return offsets.back() - offsets.front() + 1 == static_cast<int64_t>(offsets.size());
}

bool are_even(const std::vector<int64_t>& offsets) {
  for (size_t i = 2; i < offsets.size(); ++i)
    if (offsets[i] - offsets[i - 1] != offsets[1] - offsets[0]) return false;
  return true;
}

class TapRuns {
 public:
  TapRuns(const ConvView& view, const float* src, const float* w, const float* bias,
          const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        w_(w),
        bias_(bias),
        epilogue_(epilogue.at(view.dst_offset)),
        rows_(distinct_offsets(view, &ConvTap::h)),
        columns_(distinct_offsets(view, &ConvTap::w)),
        padded_(round_up(view.K, kL)),
        row_terms_(static_cast<int64_t>(columns_.size()) * view.C),
        activates_(epilogue.preactivation != nullptr || !epilogue.clamps_at_most()),
        streams_(!activates_ && view.K % kL == 0 &&
                 WideVec<float>::streams(epilogue_.y, view.N * view.pixels() * view.K,
                                         view.dst.column)) {
    const Range first = valid_range(view.J, view.step_w, columns_.front(), view.W);
    const Range last = valid_range(view.J, view.step_w, columns_.back(), view.W);
    whole_ = {std::max(first.begin, last.begin), std::min(first.end, last.end)};
    if (whole_.begin >= whole_.end) whole_ = {0, 0};
  }

  void run(const Parallel& pool) const {
    const int64_t terms = view_.terms();
    const ThreadCopies copies;
    const WorkSplit split(view_.N * view_.I,
                          static_cast<double>(view_.J * padded_) * static_cast<double>(terms + 4));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      const float* const packed =
          copies.get<float>((terms + 1) * padded_, [&](float* to) { pack(to); });
      for (int64_t item = begin; item < end; ++item)
        compute_row(item / view_.I, item % view_.I, packed);
      if (streams_) stream_fence();
    });
  }

 private:
  // [panel][row][column][channel][filter], and the bias behind them.
  void pack(float* to) const {
    std::vector<int64_t> weights(static_cast<size_t>(view_.terms()));  // of a filter, in order
    for (const ConvTap& tap : view_.taps) {
      const int64_t r = std::lower_bound(rows_.begin(), rows_.end(), tap.h) - rows_.begin();
      for (int64_t c = 0; c < view_.C; ++c)
        weights[r * row_terms_ + (tap.w - columns_.front()) * view_.C + c] =
            tap.weight + c * view_.weight_c;
    }
    for (int64_t first = 0; first < padded_; first += kFilters) {
      const int64_t width = std::min(kFilters, padded_ - first);
      const int64_t filters = std::min(width, view_.K - first);
      for (const int64_t weight : weights) {
        const float* from = w_ + weight + first * view_.weight_k;
        for (int64_t k = 0; k < filters; ++k) to[k] = from[k * view_.weight_k];
        std::fill(to + filters, to + width, 0.0f);
        to += width;
      }
    }
    std::fill_n(to, padded_, 0.0f);
    if (bias_ != nullptr) std::copy_n(bias_, view_.K, to);
  }

  void compute_row(int64_t n, int64_t i, const float* packed) const {
    const int64_t h = i * view_.step_h, count = static_cast<int64_t>(rows_.size());
    int64_t first = 0, end = count;
    while (first < end && h + rows_[first] < 0) ++first;
    while (end > first && h + rows_[end - 1] >= view_.H) --end;
    const Epilogue<float> to = epilogue_.at(n * view_.dst.n + i * view_.dst.row);
    TapRunTile tile{};
    tile.src_row = count > 1 ? (rows_[1] - rows_[0]) * view_.src.row : 0;
    tile.pixel_step = view_.step_w * view_.src.column;
    tile.rows = end - first;
    tile.c_step = view_.dst.column;
    tile.stream = streams_;
    tile.clamp = !activates_ && epilogue_.clamps();
    tile.most = epilogue_.most();
    const float* const image =
        src_ + n * view_.src.n + (end > first ? h + rows_[first] : 0) * view_.src.row;
    const auto compute = [&](int64_t j, int64_t pixels, Range taps) {
      const int64_t column = j * view_.step_w + columns_.front() + taps.begin;
      tile.src = image + (taps.empty() ? 0 : column) * view_.src.column;
      tile.run = taps.size() * view_.C;
      for (int64_t k = 0; k < padded_; k += kFilters) {
        const int64_t width = std::min(kFilters, padded_ - k), vectors = width / kL;
        tile.w = packed + k * view_.terms() + (first * row_terms_ + taps.begin * view_.C) * width;
        tile.w_row = row_terms_ * width;
        tile.bias = packed + padded_ * view_.terms() + k;
        tile.lanes = std::min(width, view_.K - k) - (vectors - 1) * kL;
        const int64_t at = j * view_.dst.column + k;
        tile.c = to.sums() + at;
        tile.before = to.residual != nullptr ? to.residual + at : nullptr;
        tap_run_microkernel(pixels, vectors)(tile);
      }
    };
    const auto edge = [&](int64_t j) {
      const int64_t column = j * view_.step_w + columns_.front();
      const auto width = static_cast<int64_t>(columns_.size());
      const int64_t begin = std::clamp<int64_t>(-column, 0, width);
      compute(j, 1, {begin, std::clamp(view_.W - column, begin, width)});
    };
    for (int64_t j = 0; j < whole_.begin; ++j) edge(j);
    for_row_tiles(whole_.size(), [&](int64_t j, int64_t pixels) {
      compute(whole_.begin + j, pixels, {0, static_cast<int64_t>(columns_.size())});
    });
    for (int64_t j = whole_.end; j < view_.J; ++j) edge(j);
    if (!activates_) return;
    const int64_t together = view_.dst.column == view_.K ? view_.J : 1;
    for (int64_t j = 0; j < view_.J; j += together) {
      const int64_t at = j * view_.dst.column;
      activate(epilogue_.activation, to.sums() + at, to.y + at, together * view_.K);
    }
  }

  const ConvView& view_;
  const float* src_;
  const float* w_;
  const float* bias_;
  const Epilogue<float> epilogue_;
  const std::vector<int64_t> rows_, columns_;  // of the taps
  const int64_t padded_;                       // filters in whole vectors
  const int64_t row_terms_;
  const bool activates_;  // finished rows, beyond what the kernel does
  const bool streams_;
  Range whole_;  // columns all of whose taps are inside
};

}  // namespace

bool tap_runs_applies(const ConvView& view) {
  if (view.groups != 1 || view.src.c != 1 || view.dst.c != 1 || view.terms() == 0 ||
      view.src.column != view.C || view.C > kMostChannels || view.terms() > kDepth)
    return false;
  const std::vector<int64_t> rows = distinct_offsets(view, &ConvTap::h);
  const std::vector<int64_t> columns = distinct_offsets(view, &ConvTap::w);
  return view.taps.size() == rows.size() * columns.size() && are_neighbours(columns) &&
         are_even(rows);
}

void tap_runs(const ConvView& view, const float* src, const float* w, const float* bias,
              const Epilogue<float>& epilogue, const Parallel& pool) {
  TapRuns(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
