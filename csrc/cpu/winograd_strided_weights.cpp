// Vectors run along filters: the taps of a vector of channels are gathered as for a stride of 1,
// then an axis gives five points of the outer taps, and the middle tap as it is.
#include "cpu/winograd_strided_weights.h"

#include "cpu/winograd_weights.h"

namespace torchconv::cpu::winograd_strided {
namespace {

using V = Vec<float>;
using Register = V::Type;

constexpr int64_t kAllTaps = kTaps * kTaps;

// u[plane] of one vector of filters of one channel.
TORCHCONV_INLINE void transform_filter(const float* g, float* u, int64_t plane, bool streams) {
  Register columns[kTaps][kSide];
#pragma GCC unroll 3
  for (int s = 0; s < kTaps; ++s) {
    Register taps[kTaps];
#pragma GCC unroll 3
    for (int r = 0; r < kTaps; ++r) taps[r] = V::load(g + (r * kTaps + s) * kFilters);
    pair::transform_weight(taps, columns[s]);
    columns[s][kSide - 1] = taps[2];
  }
#pragma GCC unroll 6
  for (int r = 0; r < kSide; ++r) {
    const Register taps[kTaps] = {columns[0][r], columns[1][r], columns[2][r]};
    Register row[kSide];
    pair::transform_weight(taps, row);
    row[kSide - 1] = taps[2];
#pragma GCC unroll 6
    for (int s = 0; s < kSide; ++s)
      WideVec<float>::store(u + (r * kSide + s) * plane, row[s], streams);
  }
}

}  // namespace

void transform_weights(const Plan& plan, const float* w, int64_t panel, int64_t block, float* u,
                       bool streams) {
  const WeightLayout layout(plan);
  const ConvView& view = plan.view;
  const int64_t filters = std::min(view.K - panel * kFilters, kFilters);
  w += panel * kFilters * view.weight_k;
  const winograd::TapOffsets taps{kAllTaps, plan.tap_weight};
  alignas(64) float g[kVector * kAllTaps * kFilters];
  for (int64_t vector = 0; vector < plan.vectors_in(block); ++vector) {
    const int64_t c = (block * plan.block_vectors + vector) * kVector;
    const int64_t channels = std::min(view.C - c, kVector);
    winograd::gather_taps(view, taps, w + c * view.weight_c, filters, channels, g);
    for (int64_t i = channels * kAllTaps * kFilters; i < kVector * kAllTaps * kFilters; ++i)
      g[i] = 0.0f;
    const float* next =
        c + kVector < view.C ? w + (c + kVector) * view.weight_c : w + kFilters * view.weight_k;
    for (int64_t i = 0; i < kVector; ++i) {
      winograd::prefetch_weights(view, taps, next, i);
      for (int64_t k = 0; k < filters; k += kVector)
        transform_filter(g + i * kAllTaps * kFilters + k, u + (vector * kVector + i) * kFilters + k,
                         layout.plane, streams);
    }
  }
  if (streams) stream_fence();
}

}  // namespace torchconv::cpu::winograd_strided
