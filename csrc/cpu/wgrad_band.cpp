// The geometry of a band, from the shape alone.
#include "cpu/wgrad_band.h"

namespace torchconv::cpu {
namespace {

// A quarter of a second-level cache of 1 MB, in floats.
constexpr double kMostElements = 1 << 16;

}  // namespace

WgradBand::WgradBand(const ConvView& view, const WgradPixels& pixels, int64_t channels)
    : view_(view), whole_rows_(view.J <= pixels.chunk()) {
  const Range taps_h = tap_span(view, &ConvTap::h), taps_w = tap_span(view, &ConvTap::w);
  first_h_ = taps_h.begin, first_w_ = taps_w.begin;
  span_h_ = taps_h.size() - 1, span_w_ = taps_w.size() - 1;
  const int64_t columns = std::min(view.J, pixels.chunk());
  const int64_t segments = whole_rows_ ? pixels.chunk() / view.pixels() + 2 : pixels.max_pieces();
  const double wide = static_cast<double>(columns) * static_cast<double>(view.step_w) +
                      static_cast<double>(span_w_);
  const double high = static_cast<double>(whole_rows_ ? pixels.max_pieces() : 0) *
                          static_cast<double>(view.step_h) +
                      static_cast<double>(segments) * (static_cast<double>(span_h_) + 1);
  fits_ = wide * high * static_cast<double>(channels) <= kMostElements;
  if (!fits_) return;
  constexpr int64_t kSlack = kVectorBytes / 4;  // copies store whole vectors
  const int64_t width = (columns - 1) * view.step_w + span_w_ + 1;
  const int64_t rows =
      (whole_rows_ ? pixels.max_pieces() * view.step_h : 0) + segments * (span_h_ + 1);
  const bool pixels_inner = view.src.column == 1;
  column_ = pixels_inner ? 1 : channels;
  row_ = width * column_;
  channel_ = pixels_inner ? rows * row_ + kSlack : 1;
  size_ = pixels_inner ? channels * channel_ : rows * row_ + kSlack;
}

}  // namespace torchconv::cpu
