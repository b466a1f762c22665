// The tile of shared_taps.h, by a product (FloatProduct, or PairProduct of pair_product.h).
#pragma once

#include "cpu/microkernels/shared_taps.h"

namespace torchconv::cpu {

template <typename Product, int kTaps, int kLines>
void shared_taps_tile(const SharedTapsTile& tile) {
  using V = Vec<float>;
  constexpr int kOutputs = kSharedTapsOutputs / kLines, kPositions = kOutputs + kTaps - 1;
  // An address is a pointer and up to three steps, of which a register each holds one and three:
  // along the only line, or from line to line.
  constexpr int kSteps = kLines == 1 ? 4 : 1, kPointers = (kPositions + kSteps - 1) / kSteps;
  static_assert(kLines <= 4);
  const int64_t step = kLines == 1 ? tile.source_step : tile.source_line;
  const float* at[kPointers];
#pragma GCC unroll 16
  for (int p = 0; p < kPointers; ++p) at[p] = tile.source + p * kSteps * tile.source_step;
  V::Type sums[kLines][kOutputs];
  const V::Type bias = V::load(tile.bias);
#pragma GCC unroll 4
  for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 16
    for (int i = 0; i < kOutputs; ++i) sums[l][i] = bias;
  const float* w = tile.weights;
  const float* const end = w + tile.depth * kTaps * V::kLanes;
  for (; w < end; w += kTaps * V::kLanes) {
    V::Type filters[kTaps];
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) filters[t] = V::load(w + t * V::kLanes);
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 32
      for (int p = 0; p < kPositions; ++p) {
        const V::Type x = V::broadcast(at[p / kSteps][(kLines == 1 ? p % kSteps : l) * step]);
#pragma GCC unroll 8
        for (int t = 0; t < kTaps; ++t)
          if (p - t >= 0 && p - t < kOutputs) Product::add(sums[l][p - t], x, filters[t]);
      }
#pragma GCC unroll 16
    for (int p = 0; p < kPointers; ++p) ++at[p];
  }
  if (tile.clamps) {
    const V::Type most = V::broadcast(tile.most);
#pragma GCC unroll 16
    for (int i = 0; i < kSharedTapsOutputs; ++i)
      sums[i / kOutputs][i % kOutputs] = clamped(sums[i / kOutputs][i % kOutputs], most);
  }
  const int64_t out_line = tile.line_step, out_step = tile.step;
  if constexpr (Product::kRounds) {
    if (tile.rounded != nullptr) {
      BFloat16* const rounded = tile.rounded;
#pragma GCC unroll 4
      for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 16
        for (int i = 0; i < kOutputs; ++i)
          Product::template store<1>(rounded + l * out_line + i * out_step, {sums[l][i]},
                                     tile.lanes);
      return;
    }
  }
  float* const out = tile.out;
  if (tile.lanes < V::kLanes) {
#pragma GCC unroll 4
    for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 16
      for (int i = 0; i < kOutputs; ++i)
        V::store_partial(out + l * out_line + i * out_step, sums[l][i], tile.lanes);
    return;
  }
#pragma GCC unroll 4
  for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 16
    for (int i = 0; i < kOutputs; ++i) V::store(out + l * out_line + i * out_step, sums[l][i]);
}

template <typename Product>
SharedTapsMicrokernel find_shared_taps_tile(int64_t taps, bool one_line) {
  if (taps == 3)
    return one_line ? shared_taps_tile<Product, 3, 1>
                    : shared_taps_tile<Product, 3, kSharedTapsLines>;
  return one_line ? shared_taps_tile<Product, 5, 1>
                  : shared_taps_tile<Product, 5, kSharedTapsLines>;
}

}  // namespace torchconv::cpu
