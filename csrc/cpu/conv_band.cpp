// The geometry of a band, from one sample's shape.
#include "cpu/conv_band.h"

#include <algorithm>

#include "cpu/channel_pairs.h"

namespace torchconv::cpu {

namespace {

// Elements of scratch that a band may take.
constexpr int64_t most_elements(int64_t element_size) { return (512 << 10) / element_size; }
// Filters for which a view is cut into pieces, and the least columns of one: many lines of the
// image.
constexpr int64_t kPieceFilters = 8, kPieceColumns = 128;

}  // namespace

BandExtent::BandExtent(const ConvView& view, bool along_pixels, int64_t element_size,
                       int64_t vector_lanes)
    : fits(false) {
  const int64_t most = most_elements(element_size);
  const bool two_vectors = view.C == 1 && view.groups * view.K > vector_lanes;
  lanes = along_pixels ? 1 : two_vectors ? 2 * vector_lanes : vector_lanes;
  const Range taps_h = tap_span(view, &ConvTap::h), taps_w = tap_span(view, &ConvTap::w);
  first_h = taps_h.begin, first_w = taps_w.begin;
  const int64_t span_h = taps_h.size() - 1, span_w = taps_w.size() - 1;
  phases_h = std::min(view.step_h, span_h + 1);
  phases_w = std::min(view.step_w, span_w + 1);
  width = view.J + span_w / view.step_w;
  // The zeros right of a row may be those left of the next.
  const int64_t right = view.J - 1 + first_w + span_w - (view.W - 1);
  shared = view.step_w == 1 ? std::max<int64_t>(std::min({-first_w, right, span_w}), 0) : 0;
  width -= shared;
  halo = span_h / view.step_h;
  // The second factor guards the products below.
  if (width > most || halo > most || phases_h > most || phases_w > most) return;
  row = static_cast<double>(view.C) * static_cast<double>(phases_h * phases_w) *
        static_cast<double>(width * lanes);
  fits = row * static_cast<double>(halo + 1) <= static_cast<double>(most);
}

std::vector<ConvView> column_pieces(const ConvView& view, int64_t element_size,
                                    int64_t vector_lanes) {
  const BandExtent extent(view, true, element_size, vector_lanes);
  if (extent.fits || view.groups > 1 || view.K > kPieceFilters || !view.src_pixels_contiguous())
    return {view};
  const double columns = static_cast<double>(most_elements(element_size)) /
                         static_cast<double>(view.C * extent.phases_h * extent.phases_w) /
                         static_cast<double>(extent.halo + 1);
  const auto most = static_cast<int64_t>(columns) - (extent.width - view.J);
  if (most < kPieceColumns) return {view};
  const int64_t width = std::min(most, ceil_div(view.J, ceil_div(view.J, most)));
  std::vector<ConvView> pieces;
  for (int64_t j = 0; j < view.J; j += width) {
    ConvView& piece = pieces.emplace_back(view);
    piece.J = std::min(width, view.J - j);
    piece.dst_offset += j * view.dst.column;
    for (ConvTap& tap : piece.taps) tap.w += j * view.step_w;
  }
  return pieces;
}

ConvBand::ConvBand(const ConvView& view, bool along_pixels, int64_t element_size,
                   int64_t vector_lanes, int64_t most_rows)
    : pixels(along_pixels) {
  const BandExtent extent(view, along_pixels, element_size, vector_lanes);
  lanes = extent.lanes;
  first_h_ = extent.first_h;
  phases_h_ = extent.phases_h, phases_w_ = extent.phases_w;
  width = extent.width;
  // Bands are cut to stay in the first-level cache (one plane) or the second.
  const int64_t budget = (pixels && view.C == 1 ? 32 << 10 : 384 << 10) / element_size;
  const int64_t channels = view.groups * view.K;
  blocks = pixels ? view.groups : (channels + lanes - 1) / lanes;
  if (!pixels) {
    lane_source_.reserve(static_cast<size_t>(channels));
    for (int64_t channel = 0; channel < channels; ++channel)
      lane_source_.push_back(channel / view.K * view.C * view.src.c);
  }
  const int64_t halo = extent.halo;
  const double row = extent.row;
  const int64_t affordable = static_cast<int64_t>(static_cast<double>(budget) / row) - halo;
  // At least as many rows as the halo repeats, where they exist.
  band = std::min(view.I, std::max({affordable, std::min(halo, int64_t{8}), int64_t{1}}));
  if (most_rows > 0) band = std::min(view.I, most_rows);
  bands = (view.I + band - 1) / band;
  band = (view.I + bands - 1) / bands;
  bands = (view.I + band - 1) / band;
  rows_ = band + halo;
  next_band_ = std::min(view.H, band * view.step_h) * view.src.row;
  plane_ = rows_ * width * lanes + vector_lanes + extent.shared * lanes;
  size = view.C * phases_h_ * phases_w_ * plane_;
  ranges_.reserve(static_cast<size_t>(phases_w_));
  first_column_.reserve(static_cast<size_t>(phases_w_));
  for (int64_t phase = 0; phase < phases_w_; ++phase) {
    ranges_.push_back(valid_range(width, view.step_w, extent.first_w + phase, view.W));
    first_column_.push_back((extent.first_w + phase) * view.src.column);
  }
  offsets.reserve(static_cast<size_t>(view.terms()));
  for (int64_t c = 0; c < view.C; ++c) {
    for (const ConvTap& tap : view.taps) {
      const int64_t h = tap.h - first_h_, w = tap.w - extent.first_w;
      const int64_t phase = (c * phases_h_ + h % view.step_h) * phases_w_ + w % view.step_w;
      offsets.push_back(phase * plane_ + (h / view.step_h * width + w / view.step_w) * lanes);
    }
  }
}

void ConvBand::fill_pairs(const ConvView& view, const BFloat16* src, int64_t block, int64_t i0,
                          float* scratch) const {
  using Bits = Vec<uint32_t>;
  constexpr int64_t kL = Bits::kLanes;
  src += block * view.C * view.src.c;
  for (int64_t c = 0; c < view.C; c += 2, src += 2 * view.src.c) {
    const bool both = c + 1 < view.C;
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t phase = 0; phase < phases_h_; ++phase) {
        const int64_t h = (i0 + row) * view.step_h + first_h_ + phase;
        float* const to = scratch + (c / 2 * phases_h_ + phase) * plane_ + row * width;
        const Range range = h < 0 || h >= view.H ? Range{0, 0} : ranges_[0];
        if (range.begin >= range.end) {
          fill_zero(to, width);
          continue;
        }
        fill_zero(to, range.begin);
        const BFloat16* const even = src + h * view.src.row + first_column_[0];
        const BFloat16* const odd = both ? even + view.src.c : even;
        for (int64_t i = range.begin; i < range.end; i += kL) {
          const int64_t n = std::min(kL, range.end - i);
          __builtin_prefetch(even + next_band_ + i);
          __builtin_prefetch(odd + next_band_ + i);
          Bits::store_partial(to + i, zip_pairs(even + i, n, odd + i, both ? n : 0), n);
        }
        fill_zero(to + range.end, width - range.end);
      }
  }
  clear_slack<BFloat16>(scratch);
}

}  // namespace torchconv::cpu
