// fprop and dgrad with few filters in channels_last. Filters that do not fill a vector are no axis
// to compute along, but what a filter reads of a row of the image is one piece of memory: the
// channels of all taps of that row. So vectors run along the terms, straight from the image, and
// their lanes are summed at the end (microkernels/inner_product.h).
//
// Outputs are grouped by the taps that reach the image from them (axis_groups.h), so nothing is
// padded: the tiles of the middle run along rows, those of the columns at the sides downwards. A
// task is a block of rows of a sample; its outputs wait in scratch for the epilogue.
#include "cpu/inner_gather.h"

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "cpu/axis_groups.h"
#include "cpu/microkernels/inner_product.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Terms that are summed in a lane before sums go to memory (see kDepth in microkernels/gemm.h).
constexpr int64_t kTermsOfLane = 128;
constexpr int64_t kBlockRows = 16;

// Calls f(first, count) on the runs of neighbouring taps among distinct offsets [taps.begin,
// taps.end) of the columns.
template <typename F>
void for_tap_runs(const ConvView& view, const std::vector<int64_t>& offsets, Range taps, F&& f) {
  for (int64_t t = taps.begin; t < taps.end;) {
    int64_t n = 1;
    while (t + n < taps.end && view.src.column == view.C && offsets[t + n] == offsets[t] + n) ++n;
    f(t, n);
    t += n;
  }
}

template <typename T>
class InnerGather {
 public:
  static constexpr int64_t kL = Vec<T>::kLanes;

  InnerGather(const ConvView& view, const T* src, const T* w, const T* bias,
              const Epilogue<T>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(epilogue),
        rows_(distinct_offsets(view, &ConvTap::h)),
        columns_(distinct_offsets(view, &ConvTap::w)),
        row_groups_(group_outputs(rows_, view.step_h, view.H, {0, view.I}, 1)),
        column_groups_(group_outputs(columns_, view.step_w, view.W, {0, view.J}, 1)),
        tap_row_(round_up(static_cast<int64_t>(columns_.size()) * view.C, kL)),
        filter_step_(static_cast<int64_t>(rows_.size()) * tap_row_),
        weights_(view.K * filter_step_),
        bias_(view.K),
        block_rows_(ceil_div(view.I, ceil_div(view.I, kBlockRows))),
        pieces_(ceil_div(view.K, kInnerFilters)) {
    std::fill_n(weights_.get(), view.K * filter_step_, T{0});
    for (int64_t k = 0; k < view.K; ++k) {
      bias_[k] = bias != nullptr ? bias[k] : T{0};
      for (const ConvTap& tap : view.taps) {
        const T* from = w + k * view.weight_k + tap.weight;
        T* to = weights_.get() + k * filter_step_ + rank(rows_, tap.h) * tap_row_ +
                rank(columns_, tap.w) * view.C;
        for (int64_t c = 0; c < view.C; ++c) to[c] = from[c * view.weight_c];
      }
    }
    for (const AxisGroup& r : row_groups_)
      for (const AxisGroup& c : column_groups_) add_runs(r.taps, c.taps);
  }

  void run(const Parallel& pool) {
    const int64_t blocks = ceil_div(view_.I, block_rows_);
    const int64_t size = round_up(block_rows_ * view_.J * view_.K, kL);
    const WorkSplit split(view_.N * blocks,
                          static_cast<double>(size) * static_cast<double>(view_.terms() + 4 * kL));
    Buffer<T> scratch(split.slots * size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      T* out = scratch.get() + slot * size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i0 = task % blocks * block_rows_, n = task / blocks;
        const Range i{i0, std::min(i0 + block_rows_, view_.I)};
        multiply(n, i, out);
        store(n, i, out);
      }
    });
  }

 private:
  static int64_t rank(const std::vector<int64_t>& offsets, int64_t offset) {
    return std::lower_bound(offsets.begin(), offsets.end(), offset) - offsets.begin();
  }

  // The runs of a group of rows and one of columns, cut where sums go to memory.
  void add_runs(Range rows, Range columns) {
    const Range none{static_cast<int64_t>(chunks_.size()), static_cast<int64_t>(chunks_.size())};
    group_chunks_.push_back(none);
    int64_t vectors = kTermsOfLane;
    for (int64_t h = rows.begin; h < rows.end; ++h)
      for_tap_runs(view_, columns_, columns, [&](int64_t t, int64_t n) {
        const int64_t src = rows_[h] * view_.src.row + columns_[t] * view_.src.column;
        const int64_t w = h * tap_row_ + t * view_.C;
        for (int64_t done = 0; done < n * view_.C;) {
          if (vectors == kTermsOfLane) {
            const auto at = static_cast<int64_t>(runs_.size());
            chunks_.push_back({at, at});
            vectors = 0;
          }
          const int64_t length = std::min(n * view_.C - done, (kTermsOfLane - vectors) * kL);
          runs_.push_back({src + done, w + done, length});
          ++chunks_.back().end;
          vectors += ceil_div(length, kL);
          done += length;
        }
      });
    group_chunks_.back().end = static_cast<int64_t>(chunks_.size());
  }

  void multiply(int64_t n, Range block, T* out) const {
    for (int64_t p = 0; p < block.size() * view_.J; ++p)
      for (int64_t k = 0; k < view_.K; ++k) out[p * view_.K + k] = bias_[k];
    const int64_t row = view_.step_h * view_.src.row, column = view_.step_w * view_.src.column;
    for (size_t r = 0; r < row_groups_.size(); ++r) {
      const Range i{std::max(block.begin, row_groups_[r].outputs.begin),
                    std::min(block.end, row_groups_[r].outputs.end)};
      if (i.empty()) continue;
      for (size_t c = 0; c < column_groups_.size(); ++c) {
        const Range j = column_groups_[c].outputs;
        const Range chunks = group_chunks_[r * column_groups_.size() + c];
        const T* src = src_ + n * view_.src.n + i.begin * row + j.begin * column;
        T* to = out + ((i.begin - block.begin) * view_.J + j.begin) * view_.K;
        const int64_t out_row = view_.J * view_.K;
        if (j.size() >= std::min(i.size(), kInnerPixels)) {
          for (int64_t y = 0; y < i.size(); ++y)
            multiply_line(chunks, src + y * row, column, j.size(), to + y * out_row, view_.K);
        } else {
          for (int64_t x = 0; x < j.size(); ++x)
            multiply_line(chunks, src + x * column, row, i.size(), to + x * view_.K, out_row);
        }
      }
    }
  }

  // `count` outputs whose sources lie `step` apart.
  void multiply_line(Range chunks, const T* src, int64_t step, int64_t count, T* out,
                     int64_t out_pixel) const {
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      InnerTile<T> tile{};
      tile.step = step;
      tile.runs = runs_.data() + chunks_[chunk].begin;
      tile.run_count = chunks_[chunk].size();
      tile.filter_step = filter_step_;
      tile.out_pixel = out_pixel;
      for (int64_t at = 0; at < count;) {
        const int64_t pixels = inner_tile_pixels(count - at, ceil_div(view_.K, pieces_));
        tile.src = src + at * step;
        for (int64_t piece = 0; piece < pieces_; ++piece) {
          const int64_t k = piece * view_.K / pieces_;
          const int64_t filters = (piece + 1) * view_.K / pieces_ - k;
          tile.w = weights_.get() + k * filter_step_;
          tile.out = out + at * out_pixel + k;
          inner_microkernel<T>(pixels, filters)(tile);
        }
        at += pixels;
      }
    }
  }

  void store(int64_t n, Range i, T* out) const {
    const int64_t dst = view_.dst_offset + n * view_.dst.n + i.begin * view_.dst.row;
    const bool row_dense = view_.dst.column == view_.K || view_.J == 1;
    if (row_dense && (view_.dst.row == view_.J * view_.K || i.size() == 1))
      return epilogue_.store(out, i.size() * view_.J * view_.K, dst, 1);
    const int64_t run = row_dense ? view_.J : 1;
    for (int64_t y = 0; y < i.size(); ++y)
      for (int64_t j = 0; j < view_.J; j += run)
        epilogue_.store(out + (y * view_.J + j) * view_.K, run * view_.K,
                        dst + y * view_.dst.row + j * view_.dst.column, 1);
  }

  const ConvView& view_;
  const T* src_;
  const Epilogue<T>& epilogue_;
  std::vector<int64_t> rows_, columns_;  // distinct offsets of the taps
  std::vector<AxisGroup> row_groups_, column_groups_;
  int64_t tap_row_, filter_step_;
  Buffer<T> weights_;  // [filter][tap row][tap, channel]
  Buffer<T> bias_;     // [filter]
  int64_t block_rows_, pieces_;
  std::vector<TermRun> runs_;
  std::vector<Range> chunks_;        // of runs_
  std::vector<Range> group_chunks_;  // [row group][column group], of chunks_
};

}  // namespace

bool inner_gather_applies(const ConvView& view) {
  return view.groups == 1 && view.src.c == 1 && (view.dst.c == 1 || view.K == 1);
}

double inner_gather_lanes_used(const ConvView& view, int64_t vector_lanes) {
  int64_t vectors = 0;
  const std::vector<int64_t> columns = distinct_offsets(view, &ConvTap::w);
  for_tap_runs(view, columns, {0, static_cast<int64_t>(columns.size())},
               [&](int64_t, int64_t n) { vectors += ceil_div(n * view.C, vector_lanes); });
  return static_cast<double>(static_cast<int64_t>(columns.size()) * view.C) /
         static_cast<double>(vectors * vector_lanes);
}

template <typename T>
void inner_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                  const Epilogue<T>& epilogue, const Parallel& pool) {
  InnerGather<T>(view, src, w, bias, epilogue).run(pool);
}

template void inner_gather(const ConvView&, const float*, const float*, const float*,
                           const Epilogue<float>&, const Parallel&);
template void inner_gather(const ConvView&, const double*, const double*, const double*,
                           const Epilogue<double>&, const Parallel&);

}  // namespace torchconv::cpu
