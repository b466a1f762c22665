// The rows of sums are renamed, not moved: a copy of a register costs nothing but its decoding.
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

TORCHCONV_INLINE Register lanes_of(Register v, Lanes lanes) {
  if constexpr (kPermutesLanes<float>) {
    return permute(v, lanes);
  } else {
    Register x{};
    for (int l = 0; l < kL; ++l) x[l] = v[lanes[l]];
    return x;
  }
}

// sums[t] += the products of a row with taps t, kFirst <= t <= kLast.
template <int kCount, int kFirst, int kLast>
TORCHCONV_INLINE void add_row(const GroupWinogradTile& tile, const float* src,
                              Register (&sums)[kTaps][kPoints]) {
  Register d[kPoints], v[kPoints];
#pragma GCC unroll 6
  for (int s = 0; s < kCount; ++s) d[s] = V::load(src + s * tile.src.column);
#pragma GCC unroll 6
  for (int s = kTaps - 1; s < kCount; ++s)
    __builtin_prefetch(src + s * tile.src.column + tile.src.ahead, 0, 2);
  winograd::transform_input<kCount == kPoints>(d, v);
  Lanes lanes = Vec<LaneIndex<float>>::load(tile.lanes);
  const float* w = tile.weights;
  const float* const end = w + tile.channels * kPoints * kTaps * kL;
  for (; w < end; w += kPoints * kTaps * kL, lanes += 1) {
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      const Register x = lanes_of(v[p], lanes);
#pragma GCC unroll 3
      for (int t = kFirst; t <= kLast; ++t) sums[t][p] += x * V::load(w + (p * kTaps + t) * kL);
    }
  }
}

template <int kCount>
bool run(const GroupWinogradTile& tile) {
  constexpr int kColumns = kCount - kTaps + 1;
  Register sums[kTaps][kPoints];
#pragma GCC unroll 3
  for (int t = 0; t < kTaps; ++t)
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) sums[t][p] = Register{};
  Register special{};
  const float* src = tile.src.src;
  float* dst = tile.dst;
  const bool whole = tile.used == kL && tile.columns == kColumns;
  for (int64_t s = 0; s < tile.rows + kTaps - 1; ++s, src += tile.src.row) {
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) {
      sums[2][p] = sums[1][p];
      sums[1][p] = sums[0][p];
      sums[0][p] = Register{};
    }
    if (s >= tile.src.begin && s < tile.src.end) {
      // Of the first rows and the last some taps have no output.
      if (s == 0)
        add_row<kCount, 0, 0>(tile, src, sums);
      else if (s == tile.rows + 1)
        add_row<kCount, 2, 2>(tile, src, sums);
      else
        add_row<kCount, 0, 2>(tile, src, sums);
    }
    if (s < kTaps - 1) continue;
    Register y[kOutputs];
    winograd::transform_output<kCount == kPoints>(sums[2], y);
    const Register bias = V::load(tile.bias);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      __builtin_prefetch(dst + tile.dst_row * 2 + j * tile.dst_column, 1, 3);
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
    if (whole) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) V::store(dst + j * tile.dst_column, y[j]);
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j)
        if (j < tile.columns) V::store_partial(dst + j * tile.dst_column, y[j], tile.used);
    }
    dst += tile.dst_row;
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
