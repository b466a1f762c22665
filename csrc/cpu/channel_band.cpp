// The geometry of a channel band, from one sample's shape.
#include "cpu/channel_band.h"

#include <algorithm>

#include "cpu/axis_groups.h"

namespace torchconv::cpu {
namespace {

// How many times as many positions fewer vectors may copy.
constexpr int64_t kMostTogether = 2;

// Of the vectors that copy a row's pixels, of which a vector copies several where they are short.
int64_t column_lanes(const ConvView& view) {
  return view.src.column == 1 ? kVectorBytes / int64_t{4} : 0;
}
int64_t row_lanes(const ConvView& view) {
  return view.src.row < column_lanes(view) ? column_lanes(view) / view.src.row : 0;
}

}  // namespace

BandAxis::BandAxis(std::vector<int64_t> offsets, int64_t step, int64_t outputs, int64_t lanes)
    : offsets_(std::move(offsets)), source_step_(step), outputs_(outputs) {
  const auto taps = static_cast<int64_t>(offsets_.size());
  const int64_t apart = outputs * taps, most = lanes > 0 ? kMostTogether * apart : apart;
  const int64_t span = offsets_.back() - offsets_.front() + 1;
  // The first comparison guards the products.
  const int64_t all = span <= most ? (outputs - 1) * step + span : most + 1;
  together_ = all <= apart;
  if (!together_ && all <= most) {
    // Neighbours that lie apart are copied one by one, or with what lies between them.
    const int64_t of_tap = std::min(outputs, ceil_div((outputs - 1) * step + 1, lanes));
    together_ = ceil_div(all, lanes) < taps * of_tap;
  }
  positions_ = together_ ? all : apart;
}

int64_t BandAxis::position(int64_t tap_offset) const {
  if (together_) return tap_offset - offsets_.front();
  return rank(tap_offset) * outputs_;
}

ChannelBand::ChannelBand(const ConvView& view, int64_t block_rows, int64_t block_columns,
                         int64_t channels, int64_t element_size)
    : rows(distinct_offsets(view, &ConvTap::h), view.step_h, block_rows, row_lanes(view)),
      columns(distinct_offsets(view, &ConvTap::w), view.step_w, block_columns, column_lanes(view)),
      pixel(channels) {
  constexpr int64_t kLine = 64;
  if (columns.step() * pixel * element_size % kAliasedBytes == 0) pixel += kLine / element_size;
  row = columns.positions() * pixel;
}

}  // namespace torchconv::cpu
