// Phases and points of the rows of an image, see winograd_rows_source.h.
#include "cpu/winograd_rows_source.h"

#include <algorithm>

#include "cpu/conv_pack.h"
#include "cpu/transpose_tile.h"

namespace torchconv::cpu::winograd::rows {
namespace {

using V = Vec<float>;
constexpr int kL = V::kLanes;

// Vectors of a row to its phases, in the order of their bits reversed: even columns from odd ones,
// over and over.
template <int kApart>
TORCHCONV_INLINE void split(V::Type* x) {
  constexpr auto kAll = std::make_integer_sequence<int, kL>();
  V::Type halves[kApart];
#pragma GCC unroll 4
  for (int i = 0; i < kApart / 2; ++i) {
    halves[i] = alternate_lanes<0>(x[2 * i], x[2 * i + 1], kAll);
    halves[kApart / 2 + i] = alternate_lanes<1>(x[2 * i], x[2 * i + 1], kAll);
  }
  if constexpr (kApart > 2) {
    split<kApart / 2>(halves);
    split<kApart / 2>(halves + kApart / 2);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kApart; ++i) x[i] = halves[i];
}

// phases[p*phase + t] = row[first + t*kApart + p], zero outside [0, W), for t < tiles.
template <int kApart>
void split_row(const float* row, int64_t first, int64_t W, int64_t tiles, float* phases,
               int64_t phase) {
  for (int64_t t = 0; t < tiles; t += kL) {
    V::Type x[kApart];
#pragma GCC unroll 8
    for (int i = 0; i < kApart; ++i) {
      const int64_t column = first + t * kApart + i * kL;
      const int64_t begin = std::clamp<int64_t>(-column, 0, kL);
      const int64_t end = std::clamp<int64_t>(W - column, begin, kL);
      x[i] = end - begin == kL ? V::load(row + column) : load_lanes(row + column, begin, end);
    }
    split<kApart>(x);
#pragma GCC unroll 8
    for (int i = 0; i < kApart; ++i) {
      const int p = kApart == 4 ? i % 2 * 2 + i / 2 : i % 2 * 4 + i / 2 % 2 * 2 + i / 4;
      V::store(phases + p * phase + t, x[i]);
    }
  }
}

}  // namespace

std::vector<TapGroup> tap_groups(int64_t columns, int64_t step) {
  std::vector<TapGroup> groups;
  for (int taps = kMostTaps; taps > 0; --taps)
    for (int64_t phase = 0; phase < std::min(step, columns); ++phase) {
      const int64_t count = ceil_div(columns - phase, step), threes = count / kMostTaps;
      const int64_t here = taps == kMostTaps ? threes : count % kMostTaps == taps ? 1 : 0;
      for (int64_t i = 0; i < here; ++i) {
        const int64_t first = taps == kMostTaps ? i * kMostTaps : threes * kMostTaps;
        groups.push_back({phase + first * step, taps, 0});
      }
    }
  int64_t plane = 0;
  for (TapGroup& group : groups) {
    group.plane = plane;
    plane += points_of(group.taps);
  }
  return groups;
}

int64_t planes_of(const std::vector<TapGroup>& groups) {
  return groups.back().plane + points_of(groups.back().taps);
}

Source::Source(const ConvView& view, int64_t plane)
    : C_(view.C),
      H_(view.H),
      W_(view.W),
      step_(view.step_w),
      plane_(plane),
      strides_(view.src),
      apart_(kOutputs * step_) {
  const Range taps = tap_span(view, &ConvTap::w);
  groups_ = tap_groups(taps.size(), step_);
  first_column_ = taps.begin;
  phase_ = plane_ + round_up(taps.size() / apart_ + 2, kL);
  columns_ = {
      std::clamp<int64_t>(first_column_, 0, view.W),
      std::clamp<int64_t>(first_column_ + (ceil_div(view.J, int64_t{kOutputs}) - 1) * apart_ +
                              step_ * (kOutputs - 1) + taps.size(),
                          0, view.W)};
  // A block of columns may lie in the padding only, on either side of the image.
  tiles_ = columns_.size() > 0 ? ceil_div(columns_.end - first_column_, apart_) : 0;
  const int64_t channels = strides_.c == 1 ? C_ : 1;
  line_ = phase_ * apart_ * channels;
  for (const TapGroup& group : groups_)
    for (int p = 0; p < kMostPoints; ++p) {
      const int64_t column = group.column + p * step_;
      inputs_.push_back(column % apart_ * channels * phase_ + column / apart_);
    }
  phases_offset_ = round_up(line_ * (strides_.c == 1 ? 1 : C_) + kL, kL);
}

// From the phases of a channel to the points of a group, whose inputs are so far apart.
template <int kTaps>
void Source::transform_group(const float* phases, const int64_t* inputs, float* to) const {
  constexpr int kPoints = points_of(kTaps);
  for (int64_t t = 0; t < plane_; t += kL) {
    V::Type d[kPoints], points[kPoints];
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) d[p] = V::load(phases + inputs[p] + t);
    transform_input<kTaps>(d, points);
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) V::store(to + p * plane_ + t, points[p]);
  }
}

void Source::transform(const float* image, int64_t h, float* scratch, float* to) const {
  if (h < 0 || h >= H_) {
    std::fill_n(to, C_ * channel(), 0.0f);
    return;
  }
  const float* const row = image + h * strides_.row;
  const bool together = strides_.c == 1 && C_ > 1;
  const int64_t lines = together ? 1 : C_, width = together ? C_ : 1;
  float* const phases = scratch + phases_offset_;
  const bool splits = !together && (apart_ == 4 || apart_ == 8);
  for (int64_t l = 0; splits && l < lines; ++l)
    (apart_ == 4 ? split_row<4> : split_row<8>)(row + l * strides_.c, first_column_, W_, tiles_,
                                                phases + l * apart_ * phase_, phase_);
  for (int64_t l = 0; !splits && l < lines; ++l)
    std::copy_n(row + l * strides_.c + columns_.begin * strides_.column, columns_.size() * width,
                scratch + l * line_ + (columns_.begin - first_column_) * width);
  for (int64_t l = 0; !splits && l < lines; ++l)
    for (int64_t t = 0; t < tiles_; t += kL)
      for (int64_t p = 0; p < apart_ * width; p += kL)
        transpose_tile(scratch + l * line_ + t * apart_ * width + p, apart_ * width, kL, kL,
                       phases + (l * apart_ + p) * phase_ + t, phase_,
                       std::min<int64_t>(apart_ * width - p, kL));
  for (int64_t c = 0; c < C_; ++c, to += channel()) {
    const float* from = phases + c * (together ? 1 : apart_) * phase_;
    const int64_t* inputs = inputs_.data();
    for (const TapGroup& group : groups_) {
      float* points = to + group.plane * plane_;
      if (group.taps == 3) transform_group<3>(from, inputs, points);
      if (group.taps == 2) transform_group<2>(from, inputs, points);
      if (group.taps == 1) transform_group<1>(from, inputs, points);
      inputs += kMostPoints;
    }
  }
}

}  // namespace torchconv::cpu::winograd::rows
