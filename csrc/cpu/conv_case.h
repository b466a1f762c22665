// What the choices of conv_choice.cpp and conv_ways.cpp ask of a view, and the sizes that both go
// by.
#pragma once

#include <algorithm>

#include "core/conv_problem.h"
#include "core/types.h"
#include "cpu/conv_band.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// A side this narrow would use a fraction of a register tile of the products.
constexpr int64_t kNarrow = 8;
// Filters that fill at most half a vector: vectors then run along pixels in either layout, where
// several taps share the transposed source.
constexpr int64_t kFewFilters = kVectorBytes / 8;
// Filters whose products repay the rearrangement of the image.
constexpr int64_t kPatchFilters = 32;
// Filters so few that the lanes of the inner products are summed for less than the lanes that
// filters would leave empty.
constexpr int64_t kInnerFiltersMost = 8;
// Wider groups fill the vectors of the general products; but for NCHW images, of which they have
// to rearrange more, and the phases of a stride, which the tiles pack and compute together.
constexpr int64_t kGroupWidthPixels = 64;

// Whether sums are in the type of what is summed.
constexpr bool is_wide(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat64; }

constexpr bool is_half(DType dtype) {
  return dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

struct ConvCase {
  const ConvView& v;
  const DType dtype;
  const bool winograd;

  bool is(DType t) const { return dtype == t; }
  // Of the type that is computed in.
  int64_t element_size() const { return is(DType::kFloat64) ? sizeof(double) : sizeof(float); }
  int64_t lanes() const { return kVectorBytes / element_size(); }
  int64_t taps() const { return static_cast<int64_t>(v.taps.size()); }
  int64_t narrower_side() const { return std::min(v.C, v.K); }
  int64_t wider_side() const { return std::max(v.C, v.K); }
  bool grouped() const { return v.groups > 1; }
  // Of a filter's sums along the pixels of a band.
  int64_t band_vectors() const {
    return ceil_div((v.I - 1) * BandExtent(v, true, element_size(), lanes()).width + v.J, lanes());
  }
  // Products of taps that reach the image.
  double products_inside() const {
    double inside = 0;
    for (const ConvTap& tap : v.taps)
      inside += static_cast<double>(valid_range(v.I, v.step_h, tap.h, v.H).size()) *
                static_cast<double>(valid_range(v.J, v.step_w, tap.w, v.W).size());
    return inside;
  }
};

}  // namespace torchconv::cpu
