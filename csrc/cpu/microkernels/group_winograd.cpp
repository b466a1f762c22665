// The loop over pairs of rows is not unrolled, so sums move to other registers: the processor
// renames these, and a move costs nothing but its decoding.
#include "cpu/microkernels/group_winograd.h"

#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {
namespace {

constexpr int kTaps = kGroupWinogradTaps, kOutputs = kGroupWinogradOutputs,
              kPoints = kGroupWinogradPoints;
using V = Vec<float>;
using Register = V::Type;
using Lanes = Vec<LaneIndex<float>>::Type;
constexpr int64_t kL = V::kLanes;
constexpr int kRows = kGroupWinogradRows;

TORCHCONV_INLINE Register lanes_of(Register v, Lanes lanes) {
  if constexpr (kPermutesLanes<float>) {
    return permute(v, lanes);
  } else {
    Register x{};
    for (int l = 0; l < kL; ++l) x[l] = v[lanes[l]];
    return x;
  }
}

// A row's points to v.
template <int kCount>
TORCHCONV_INLINE void transform_row(const GroupPixels& pixels, int64_t row, float* v) {
  Register d[kPoints] = {}, points[kPoints] = {};
  if (row >= pixels.begin && row < pixels.end) {
    const float* const src = pixels.src + row * pixels.row;
#pragma GCC unroll 6
    for (int s = 0; s < kCount; ++s) d[s] = V::load(src + s * pixels.column);
    if (pixels.ahead != 0) {
#pragma GCC unroll 6
      for (int s = kTaps - 1; s < kCount; ++s)
        __builtin_prefetch(src + s * pixels.column + pixels.ahead, 0, 2);
    }
    winograd::transform_input<kCount == kPoints>(d, points);
  }
#pragma GCC unroll 6
  for (int p = 0; p < kCount; ++p) V::store(v + p * kL, points[p]);
}

// Adds two rows of the source, s and s + 1 in v, to those of outputs s - 2 to s + 1 that are sums
// kFirst to kLast.
template <int kCount, int kFirst, int kLast>
TORCHCONV_INLINE void add_rows(const GroupWinogradTile& tile, const float* v,
                               Register (&sums)[kRows + kTaps - 1][kPoints]) {
  Lanes lanes = Vec<LaneIndex<float>>::load(tile.lanes);
  const float* w = tile.weights;
  const float* const end = w + tile.channels * kPoints * kTaps * kL;
  for (; w < end; w += kPoints * kTaps * kL, lanes += 1) {
    // There are no registers to keep the points in.
    __asm__("" : "+r"(v));
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      const Register x0 = lanes_of(V::load(v + p * kL), lanes);
      const Register x1 = lanes_of(V::load(v + (kPoints + p) * kL), lanes);
#pragma GCC unroll 3
      for (int t = 0; t < kTaps; ++t) {
        Register filters = V::load(w + (p * kTaps + t) * kL);
        keep_in_register(filters);
        const int to = kTaps - 1 - t;
        if (to >= kFirst && to <= kLast) sums[to][p] += x0 * filters;
        if (to + 1 >= kFirst && to + 1 <= kLast) sums[to + 1][p] += x1 * filters;
      }
    }
  }
}

// A row of outputs. Returns a vector with a NaN where one, before its bias, is not finite.
template <int kCount>
TORCHCONV_INLINE Register finish_row(const GroupWinogradTile& tile, const Register (&sums)[kPoints],
                                     float* dst) {
  constexpr int kColumns = kCount - kTaps + 1;
  Register y[kOutputs], special{};
  winograd::transform_output<kCount == kPoints>(sums, y);
  const Register bias = V::load(tile.bias);
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
    if (!tile.stream) __builtin_prefetch(dst + tile.dst_row * 2 + j * tile.dst_column, 1, 3);
    special += y[j] * 0.0f;
    y[j] += bias;
  }
  if (tile.clamp) {
    const Register high = V::broadcast(tile.high);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      y[j] = y[j] < Register{} ? Register{} : y[j];
      y[j] = y[j] > high ? high : y[j];
    }
  }
  if (tile.used == kL && tile.columns == kColumns) {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j)
      WideVec<float>::store(dst + j * tile.dst_column, y[j], tile.stream);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j)
      if (j < tile.columns) V::store_partial(dst + j * tile.dst_column, y[j], tile.used);
  }
  return special;
}

template <int kCount>
bool run(const GroupWinogradTile& tile) {
  constexpr int kSums = kRows + kTaps - 1;
  alignas(64) float points[2][kRows * kPoints * kL];
  Register sums[kSums][kPoints] = {};
  Register special{};
  const auto transform = [&](int64_t s) {
    float* const to = points[s / kRows % 2];
    transform_row<kCount>(tile.src, s, to);
    transform_row<kCount>(tile.src, s + 1, to + kPoints * kL);
  };
  transform(0);
  const int64_t source_rows = tile.rows + kTaps - 1;
  for (int64_t s = 0; s < source_rows; s += kRows) {
    // While the products of these rows wait for nothing.
    transform(s + kRows);
    tile.fetch->ask(tile.lines);
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) sums[2][p] = sums[3][p] = Register{};
    const float* const v = points[s / kRows % 2];
    if (s == 0)
      add_rows<kCount, 2, 3>(tile, v, sums);
    else if (s + kRows == source_rows)
      add_rows<kCount, 0, 1>(tile, v, sums);
    else
      add_rows<kCount, 0, 3>(tile, v, sums);
    if (s > 0) {
      float* const dst = tile.dst + (s - 2) * tile.dst_row;
      special += finish_row<kCount>(tile, sums[0], dst);
      if (s - 1 < tile.rows) special += finish_row<kCount>(tile, sums[1], dst + tile.dst_row);
    }
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      sums[0][p] = sums[2][p];
      sums[1][p] = sums[3][p];
    }
  }
  bool finite = true;
  for (int l = 0; l < kL; ++l) finite &= special[l] == 0;
  return finite;
}

}  // namespace

bool group_winograd_tile(const GroupWinogradTile& tile) {
  return tile.full ? run<kPoints>(tile) : run<kPoints - 1>(tile);
}

}  // namespace torchconv::cpu
