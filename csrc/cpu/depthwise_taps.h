// The taps of a depthwise view as rows and columns of a grid, in ascending order of their offsets.
#pragma once

#include <cstdint>

#include "cpu/conv_pack.h"
#include "cpu/conv_view.h"
#include "cpu/microkernels/plane_rows.h"

namespace torchconv::cpu {

// Tensors of so many bytes do not stay in a core's own caches; and how far ahead those that come
// from a shared cache or from memory are asked for.
inline constexpr int64_t kSharedBytes = 1 << 20, kNearAhead = 6 << 10, kFarAhead = 56 << 10;

struct DepthwiseTaps {
  DepthwiseTaps() = default;
  explicit DepthwiseTaps(const ConvView& view);
  // All taps of a problem without dilation.
  static DepthwiseTaps of(const ConvProblem& p);

  bool regular = true;  // one gap between all rows, and one between all columns
  int64_t rows = 0, columns = 0;
  int64_t first_h = 0, first_w = 0, gap_h = 1, gap_w = 1;
  // Of a filter in memory: the distance of filters, and of its taps.
  int64_t filter = 0, weight_first = 0, weight_row = 0, weight_column = 0;

  int64_t weight(int64_t r, int64_t s) const {
    return weight_first + r * weight_row + s * weight_column;
  }
};

// packed[tap][channel] of neighbouring channels, in the ascending order of offsets.
template <typename T>
void pack_taps(const DepthwiseTaps& taps, int64_t channels, const T* w, Wide<T>* packed) {
  const int64_t count = taps.rows * taps.columns;
  // A filter's taps are neighbours in memory, of which dgrad takes the last first.
  if (taps.weight_column == 1 && taps.weight_row == taps.columns)
    return pack_transposed(w + taps.weight_first, taps.filter, channels, count, packed, channels);
  if (taps.weight_column == -1 && taps.weight_row == -taps.columns)
    return pack_transposed(w + taps.weight_first - (count - 1), taps.filter, channels, count,
                           packed + (count - 1) * channels, -channels);
  for (int64_t t = 0; t < count; ++t) {
    const T* from = w + taps.weight(t / taps.columns, t % taps.columns);
    for (int64_t c = 0; c < channels; ++c)
      packed[t * channels + c] = to_wide(from[c * taps.filter]);
  }
}

// Whether dgrad is one of a square depthwise kernel of 3, 5 or 7 taps with a stride of 2.
bool depthwise_spreads(const ConvProblem& p);

// How far ahead a walk through planes is to ask for them, where those of a call have so many
// elements that they come from memory, or from a cache that others share; else 0. Strips of a row
// alternate with those of the next, which the hardware's prefetchers do not follow. Whole planes
// ahead lie the same strips, and whole rows ahead in a large plane.
template <typename A>
int64_t fetch_distance(int64_t elements, int64_t height, int64_t width) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(A));
  if (elements < kSharedBytes / kSize) return 0;
  const int64_t ahead = (elements < kStreamedBytes / kSize ? kNearAhead : kFarAhead) / kSize;
  const int64_t unit = height * width <= ahead ? height * width : width;
  return std::max<int64_t>(ahead / std::max<int64_t>(unit, 1), 1) * unit;
}

// f(shape, row, rows): output rows row, row + gap_h, ... of the view, so many; with a row gap above
// 1 each residue on its own. Source (0, 0) of the shape is that of the row's first tap.
template <typename F>
void for_plane_rows(const DepthwiseTaps& taps, const ConvView& v, F&& f) {
  const auto step = static_cast<PlaneRows::Step>(v.step_h);
  for (int64_t row = 0; row < std::min(taps.gap_h, v.I); ++row) {
    const int64_t rows = ceil_div(v.I - row, taps.gap_h);
    const Range inside =
        valid_range((rows - 1) * v.step_h + taps.rows, taps.gap_h, row + taps.first_h, v.H);
    f(PlaneRows{taps.rows, step, taps.gap_h * v.W, taps.gap_w, inside.begin, inside.end,
                -taps.first_w, v.W - taps.first_w, 0, 0, v.J},
      row, rows);
  }
}

}  // namespace torchconv::cpu
