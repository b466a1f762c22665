// The terms of winograd_rows.h: rows of taps in groups of at most three, for each channel.
#pragma once

#include <algorithm>

#include "core/buffer.h"
#include "cpu/axis_groups.h"
#include "cpu/winograd_rows_source.h"

namespace torchconv::cpu::winograd::rows {

// A term is a group of taps in a row, and a channel: [group][row][channel].
class Terms {
 public:
  explicit Terms(const ConvView& view);

  const std::vector<TapGroup>& groups() const { return groups_; }
  // Distinct offsets of the taps.
  const std::vector<int64_t>& rows() const { return rows_; }
  int64_t halo() const { return rows_.back() - rows_.front(); }
  // Those of so many taps.
  int64_t of_taps(int taps) const { return of_taps_[taps - 1]; }
  // Vectors of weights for a vector of filters, see weights_of.
  int64_t weights() const { return weights_; }
  // Of the first point of each term, in a source of such rows and channels.
  template <typename Offset>
  std::vector<Offset> offsets(int64_t row, int64_t channel, int64_t plane) const {
    std::vector<Offset> all;
    for (const TapGroup& group : groups_)
      for (const int64_t h : rows_)
        for (int64_t c = 0; c < C_; ++c)
          all.push_back(
              static_cast<Offset>((h - rows_[0]) * row + c * channel + group.plane * plane));
    return all;
  }
  // f(term, taps, points) for the vector of filters from k on.
  template <typename F>
  void for_weights(const ConvView& view, const float* w, int64_t k, F&& f) const;

 private:
  int64_t C_;
  std::vector<int64_t> rows_;
  int64_t columns_;
  std::vector<TapGroup> groups_;
  int64_t of_taps_[kMostTaps] = {};
  int64_t weights_ = 0;
  std::vector<int64_t> weight_;  // of a tap in a filter plane: [row][column], ascending
};

template <typename F>
void Terms::for_weights(const ConvView& view, const float* w, int64_t k, F&& f) const {
  using V = Vec<float>;
  constexpr int kL = V::kLanes;
  int64_t term = 0;
  for (const TapGroup& group : groups_)
    for (size_t r = 0; r < rows_.size(); ++r)
      for (int64_t c = 0; c < view.C; ++c, ++term) {
        V::Type g[kMostTaps], points[kMostPoints];
        for (int s = 0; s < group.taps; ++s) {
          const int64_t tap = static_cast<int64_t>(r) * columns_ + group.column + s * view.step_w;
          const float* from = w + weight_[static_cast<size_t>(tap)] + c * view.weight_c;
          float lanes[kL] = {};
          for (int64_t l = 0; l < std::min<int64_t>(view.K - k, kL); ++l)
            lanes[l] = from[(k + l) * view.weight_k];
          g[s] = V::load(lanes);
        }
        if (group.taps == 3) transform_weight<3>(g, points);
        if (group.taps == 2) transform_weight<2>(g, points);
        if (group.taps == 1) transform_weight<1>(g, points);
        f(term, group.taps, points);
      }
}

// What the sums of the first points start with: [vector of filters][point][filter]. bias may be
// null.
Buffer<float> bias_points(const float* bias, int64_t filters);

}  // namespace torchconv::cpu::winograd::rows
