// See phase_image.h.
#include "cpu/phase_image.h"

#include <algorithm>

#include "cpu/channel_pairs.h"
#include "cpu/parallel_range.h"
#include "cpu/plane_store.h"
#include "cpu/wide_array.h"

namespace torchconv::cpu {
namespace {

// Pixels that are transposed together: whole lines of a plane.
constexpr int64_t kPixels = 128;

}  // namespace

PhaseImage::PhaseImage(const ConvProblem& p, bool covered, const Parallel& pool)
    : p_(p), pixel_(round_up(p.C, Vec<uint16_t>::kLanes)), image_(p.N * p.H * p.W * pixel_) {
  if (!covered) zero_array(image_.get(), p.N * p.H * p.W * pixel_, pool);
}

std::vector<ConvView> PhaseImage::phases(std::vector<ConvView> views) const {
  for (ConvView& view : views) {
    view.dst.n = p_.H * p_.W * pixel_;
    view.dst.c = 1;
    view.dst.row *= pixel_;
    view.dst.column *= pixel_;
    view.dst_offset *= pixel_;
  }
  return views;
}

void PhaseImage::store(BFloat16* dx, const Parallel& pool) const {
  const int64_t plane = p_.H * p_.W, pieces = ceil_div(plane, kPixels);
  const WorkSplit split(p_.N * pieces, static_cast<double>(kPixels * p_.C));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    int64_t pixels[kPixels];
    for (int64_t i = 0; i < kPixels; ++i) pixels[i] = i;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / pieces, first = item % pieces * kPixels;
      const PlaneTarget to{
          pixels, std::min(kPixels, plane - first), n * p_.C * plane + first, plane, 1, p_.C};
      store_rounded_planes(image_.get() + (n * plane + first) * pixel_, pixel_, to, dx);
    }
  });
}

PhaseWeights::PhaseWeights(const ConvProblem& p, const BFloat16* w, const Parallel& pool)
    : channels_(round_up(p.C, 2)), tap_(p.K * channels_), weights_(p.R * p.S * tap_) {
  const int64_t taps = p.R * p.S;
  const WorkSplit split(p.K, kPackingOperations * static_cast<double>(p.C * taps));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t k = begin; k < end; ++k)
      transpose_pairs(w + k * p.C * taps, taps, 1, taps, p.C,
                      reinterpret_cast<float*>(weights_.get() + k * channels_), tap_ / 2);
  });
}

ConvView PhaseWeights::phase(ConvView view) const {
  view.weight_k = 1;
  view.weight_c = channels_;
  for (ConvTap& tap : view.taps) tap.weight *= tap_;
  return view;
}

}  // namespace torchconv::cpu
