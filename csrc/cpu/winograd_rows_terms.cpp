// See winograd_rows_terms.h.
#include "cpu/winograd_rows_terms.h"

namespace torchconv::cpu::winograd::rows {

Terms::Terms(const ConvView& view)
    : C_(view.C),
      rows_(distinct_offsets(view, &ConvTap::h)),
      columns_(tap_span(view, &ConvTap::w).size()),
      groups_(tap_groups(columns_, view.step_w)),
      weight_(view.taps.size()) {
  const int64_t of_group = static_cast<int64_t>(rows_.size()) * C_;
  for (const TapGroup& group : groups_) {
    of_taps_[group.taps - 1] += of_group;
    weights_ += of_group * weights_of(group.taps);
  }
  const int64_t first_column = tap_span(view, &ConvTap::w).begin;
  for (const ConvTap& tap : view.taps) {
    const int64_t r = std::lower_bound(rows_.begin(), rows_.end(), tap.h) - rows_.begin();
    weight_[static_cast<size_t>(r * columns_ + tap.w - first_column)] = tap.weight;
  }
}

Buffer<float> bias_points(const float* bias, int64_t filters) {
  using V = Vec<float>;
  constexpr int kL = V::kLanes;
  Buffer<float> all(round_up(filters, kL) * points_of(1));
  for (int64_t k = 0; k < filters; k += kL) {
    float lanes[kL] = {};
    if (bias != nullptr) std::copy_n(bias + k, std::min<int64_t>(filters - k, kL), lanes);
    V::Type outputs[kOutputs], points[points_of(1)];
    std::fill_n(outputs, kOutputs, V::load(lanes));
    transform_input<1>(outputs, points);
    for (int p = 0; p < points_of(1); ++p)
      V::store(all.get() + k * points_of(1) + p * kL, points[p]);
  }
  return all;
}

}  // namespace torchconv::cpu::winograd::rows
