// The geometry of a band, from one sample's shape.
#include "cpu/conv_band.h"

#include <algorithm>

namespace torchconv::cpu {

ConvBand::ConvBand(const ConvView& view, bool along_pixels, int64_t element_size,
                   int64_t vector_lanes)
    : fits(false), pixels(along_pixels) {
  // Bands are cut to stay in the first-level cache (one plane) or the second.
  const int64_t budget = (pixels && view.C == 1 ? 32 << 10 : 384 << 10) / element_size;
  const int64_t most = (512 << 10) / element_size;
  const int64_t channels = view.groups * view.K;
  lanes = pixels ? 1 : channels > vector_lanes && view.C == 1 ? 2 * vector_lanes : vector_lanes;
  blocks = pixels ? view.groups : (channels + lanes - 1) / lanes;
  if (!pixels)
    for (int64_t channel = 0; channel < channels; ++channel)
      lane_source_.push_back(channel / view.K * view.C * view.src.c);
  int64_t last_h = view.taps[0].h, last_w = view.taps[0].w, first_w = last_w;
  first_h_ = last_h;
  for (const ConvTap& tap : view.taps) {
    first_h_ = std::min(first_h_, tap.h);
    first_w = std::min(first_w, tap.w);
    last_h = std::max(last_h, tap.h);
    last_w = std::max(last_w, tap.w);
  }
  const int64_t span_h = last_h - first_h_, span_w = last_w - first_w;
  phases_h_ = std::min(view.step_h, span_h + 1);
  phases_w_ = std::min(view.step_w, span_w + 1);
  width = view.J + span_w / view.step_w;
  const int64_t halo = span_h / view.step_h;
  // The second factor guards the products below.
  if (width > most || halo > most || phases_h_ > most || phases_w_ > most) return;
  const double row = static_cast<double>(view.C) * static_cast<double>(phases_h_ * phases_w_) *
                     static_cast<double>(width * lanes);
  if (row * static_cast<double>(halo + 1) > static_cast<double>(most)) return;
  const int64_t affordable = static_cast<int64_t>(static_cast<double>(budget) / row) - halo;
  // At least as many rows as the halo repeats, where they exist.
  band = std::min(view.I, std::max({affordable, std::min(halo, int64_t{8}), int64_t{1}}));
  bands = (view.I + band - 1) / band;
  band = (view.I + bands - 1) / bands;
  bands = (view.I + band - 1) / band;
  rows_ = band + halo;
  next_band_ = std::min(view.H, band * view.step_h) * view.src.row;
  plane_ = rows_ * width * lanes + vector_lanes;
  size = view.C * phases_h_ * phases_w_ * plane_;
  for (int64_t phase = 0; phase < phases_w_; ++phase) {
    ranges_.push_back(valid_range(width, view.step_w, first_w + phase, view.W));
    first_column_.push_back((first_w + phase) * view.src.column);
  }
  for (int64_t c = 0; c < view.C; ++c) {
    for (const ConvTap& tap : view.taps) {
      const int64_t h = tap.h - first_h_, w = tap.w - first_w;
      const int64_t phase = (c * phases_h_ + h % view.step_h) * phases_w_ + w % view.step_w;
      offsets.push_back(phase * plane_ + (h / view.step_h * width + w / view.step_w) * lanes);
    }
  }
  fits = true;
}

}  // namespace torchconv::cpu
