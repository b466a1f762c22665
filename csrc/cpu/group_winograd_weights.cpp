// The transform of a vector of filters at a time.
#include "cpu/group_winograd_weights.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/microkernels/group_winograd.h"
#include "cpu/parallel_range.h"
#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {
namespace group_winograd_transform {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int64_t kL = V::kLanes;
constexpr int kTaps = kGroupWinogradTaps, kPoints = kGroupWinogradPoints,
              kDown = kGroupWinogradDown;
constexpr int64_t kTapRow = kTaps * kL, kChannel = kTaps * kTapRow;

// From channel c in vectors [c] to channel l ^ c of lane l, a bit of the lane at a time.
void exchange_channels(float* taps, int64_t channels, int64_t size) {
  LaneIndex<float> lane[kL];
  for (int l = 0; l < kL; ++l) lane[l] = l;
  const auto lanes = Vec<LaneIndex<float>>::load(lane);
  for (int bit = 1; bit < channels; bit *= 2) {
    const auto other = (lanes & bit) != 0;
    for (int64_t c = 0; c < channels; ++c) {
      if ((c & bit) != 0) continue;
      float *const a = taps + c * size, *const b = taps + (c + bit) * size;
      for (int64_t i = 0; i < size; i += kL) {
        const Register x = V::load(a + i), y = V::load(b + i);
        V::store(a + i, other ? y : x);
        V::store(b + i, other ? x : y);
      }
    }
  }
}

void transform(const float* taps, int64_t channels, float* u) {
  for (int64_t c = 0; c < channels; ++c) {
    Register g[kTaps][kPoints];
    for (int r = 0; r < kTaps; ++r) {
      const float* const row = taps + c * kChannel + r * kTapRow;
      const Register tap[kTaps] = {V::load(row), V::load(row + kL), V::load(row + 2 * kL)};
      winograd::transform_weight(tap, g[r]);
    }
    for (int p = 0; p < kPoints; ++p) {
      const Register ends = (g[0][p] + g[2][p]) * 0.5f, middle = g[1][p] * 0.5f;
      float* const to = u + (p * channels + c) * kDown * kL;
      V::store(to, g[0][p]);
      V::store(to + kL, ends + middle);
      V::store(to + 2 * kL, ends - middle);
      V::store(to + 3 * kL, g[2][p]);
    }
  }
}

}  // namespace
}  // namespace group_winograd_transform

GroupWinogradWeights::GroupWinogradWeights(const ConvView& view, const GroupBand& band,
                                           const float* w, int64_t channels, bool exchanges)
    : view_(view), weights_({&view}, band, w), channels_(channels), exchanges_(exchanges) {}

int64_t group_winograd_vector_size(int64_t channels) {
  return kGroupWinogradPoints * channels * kGroupWinogradDown * kLanes<float>;
}
int64_t GroupWinogradWeights::scratch() const {
  return weights_.vector_size() + channels_ * group_winograd_transform::kChannel;
}

void GroupWinogradWeights::run(int64_t i, float* scratch, float* u) const {
  constexpr int64_t kTapRow = group_winograd_transform::kTapRow,
                    kChannel = group_winograd_transform::kChannel;
  weights_.pack_vector(i, scratch, nullptr);
  const float* from = scratch;
  float* const taps = scratch + weights_.vector_size();
  for (int64_t r = 0; r < kGroupWinogradTaps; ++r)
    for (int64_t c = 0; c < view_.C; ++c, from += kTapRow)
      std::copy_n(from, kTapRow, taps + c * kChannel + r * kTapRow);
  fill_zero(taps + view_.C * kChannel, (channels_ - view_.C) * kChannel);
  if (exchanges_) group_winograd_transform::exchange_channels(taps, channels_, kChannel);
  group_winograd_transform::transform(taps, channels_, u);
}

void GroupWinogradWeights::run_all(float* u, const Parallel& pool) const {
  const WorkSplit split(weights_.vectors(), static_cast<double>(vector_size()));
  Buffer<float> own(split.slots * scratch());
  split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
    for (int64_t i = begin; i < end; ++i)
      run(i, own.get() + slot * scratch(), u + i * vector_size());
  });
}

}  // namespace torchconv::cpu
