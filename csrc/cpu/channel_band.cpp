// The geometry of a channel band, from one sample's shape.
#include "cpu/channel_band.h"

#include "cpu/axis_groups.h"

namespace torchconv::cpu {

BandAxis::BandAxis(std::vector<int64_t> offsets, int64_t step, int64_t outputs)
    : offsets_(std::move(offsets)), source_step_(step), outputs_(outputs) {
  const int64_t apart = outputs * static_cast<int64_t>(offsets_.size());
  const int64_t span = offsets_.back() - offsets_.front() + 1;
  // The first comparison guards the product.
  together_ = span <= apart && (outputs - 1) * step + span <= apart;
  positions_ = together_ ? (outputs - 1) * step + span : apart;
}

int64_t BandAxis::position(int64_t tap_offset) const {
  if (together_) return tap_offset - offsets_.front();
  return rank(tap_offset) * outputs_;
}

ChannelBand::ChannelBand(const ConvView& view, int64_t block_rows, int64_t block_columns,
                         int64_t channels, int64_t element_size)
    : rows(distinct_offsets(view, &ConvTap::h), view.step_h, block_rows),
      columns(distinct_offsets(view, &ConvTap::w), view.step_w, block_columns),
      pixel(channels) {
  constexpr int64_t kLine = 64;
  if (columns.step() * pixel * element_size % kAliasedBytes == 0) pixel += kLine / element_size;
  row = columns.positions() * pixel;
}

}  // namespace torchconv::cpu
