// All source rows are transformed first and all rows of outputs last, so that the products go
// through the points of the rows one by one, whose weights then stay in the first-level cache. The
// points of the columns do not leave the registers.
#include "cpu/microkernels/group_winograd.h"

#include <cstdlib>

#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {

#if defined(__AVX512F__)
namespace {

constexpr int kTaps = kGroupWinogradTaps, kOutputs = kGroupWinogradOutputs,
              kPoints = kGroupWinogradPoints, kDown = kGroupWinogradDown, kQuarter = kGroupQuarter;
using V = Vec<float>;
using Register = V::Type;
using Lanes = Vec<LaneIndex<float>>::Type;
constexpr int64_t kL = V::kLanes;
constexpr int kRows = kGroupWinogradRows, kTiles = kRows / 2;
constexpr int64_t kRow = kGroupWinogradRow;

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

// Lane l ^ kX to lane l, in one instruction without an index: within 128 bits the cheapest that
// there is.
template <int kX>
TORCHCONV_INLINE Register exchange(Register v) {
  if constexpr (kX == 0) return v;
  return permute(v, Lanes{0 ^ kX, 1 ^ kX, 2 ^ kX, 3 ^ kX, 4 ^ kX, 5 ^ kX, 6 ^ kX, 7 ^ kX, 8 ^ kX,
                          9 ^ kX, 10 ^ kX, 11 ^ kX, 12 ^ kX, 13 ^ kX, 14 ^ kX, 15 ^ kX});
}

template <int kC, int kCount>
TORCHCONV_INLINE void add_channel(const float* w, const Register (&v)[kCount][kDown],
                                  Register (&sums)[kCount][kDown]) {
#pragma GCC unroll 4
  for (int q = 0; q < kDown; ++q) {
    Register filters = V::load(w + (kC * kDown + q) * kL);
    keep_in_register(filters);
#pragma GCC unroll 2
    for (int t = 0; t < kCount; ++t) sums[t][q] += exchange<kC>(v[t][q]) * filters;
  }
}

// From the points of kCount * 2 + 2 rows to those of the columns of kCount tiles.
template <int kCount>
TORCHCONV_INLINE void transform_point(const float* rows, Register (&v)[kCount][kDown]) {
  Register r[2 * kCount + 2];
#pragma GCC unroll 6
  for (int i = 0; i < 2 * kCount + 2; ++i) r[i] = V::load(rows + i * kRow);
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    v[t][0] = r[2 * t] - r[2 * t + 2];
    v[t][1] = r[2 * t + 1] + r[2 * t + 2];
    v[t][2] = r[2 * t + 2] - r[2 * t + 1];
    v[t][3] = r[2 * t + 1] - r[2 * t + 3];
  }
}

// And back, to kCount * 2 rows of outputs.
template <int kCount>
TORCHCONV_INLINE void finish_point(const Register (&sums)[kCount][kDown], float* to) {
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    V::store(to + 2 * t * kRow, sums[t][0] + (sums[t][1] + sums[t][2]));
    V::store(to + (2 * t + 1) * kRow, (sums[t][1] - sums[t][2]) - sums[t][3]);
  }
}

// One point of the rows of kCount tiles, whose lanes are exchanged.
template <int kCount>
void multiply_exchanged(const GroupWinogradTile& tile, const float* w, const float* rows,
                        float* to) {
  Register v[kCount][kDown], sums[kCount][kDown] = {};
  transform_point<kCount>(rows, v);
  for (int64_t c = 0;;) {
    add_channel<0, kCount>(w, v, sums);
    add_channel<1, kCount>(w, v, sums);
    add_channel<2, kCount>(w, v, sums);
    add_channel<3, kCount>(w, v, sums);
    c += kQuarter;
    if (c >= tile.channels) break;
    w += kQuarter * kDown * kL;
    const bool odd = c / kQuarter % 2 != 0;
#pragma GCC unroll 2
    for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
      for (int q = 0; q < kDown; ++q) v[t][q] = odd ? exchange<4>(v[t][q]) : exchange<12>(v[t][q]);
    }
  }
  finish_point<kCount>(sums, to);
}

// The same for any lanes.
template <int kCount>
void multiply_permuted(const GroupWinogradTile& tile, const float* w, const float* rows,
                       float* to) {
  Register v[kCount][kDown], sums[kCount][kDown] = {};
  transform_point<kCount>(rows, v);
  Lanes lanes = Vec<LaneIndex<float>>::load(tile.lanes);
  for (int64_t c = 0; c < tile.channels; ++c, lanes += 1, w += kDown * kL) {
#pragma GCC unroll 4
    for (int q = 0; q < kDown; ++q) {
      Register filters = V::load(w + q * kL);
      keep_in_register(filters);
#pragma GCC unroll 2
      for (int t = 0; t < kCount; ++t) sums[t][q] += permute(v[t][q], lanes) * filters;
    }
  }
  finish_point<kCount>(sums, to);
}

// A row of outputs. Returns a vector with a NaN where one, before its bias, is not finite.
template <int kCount>
TORCHCONV_INLINE Register finish_row(const GroupWinogradTile& tile, const float* sums, float* dst) {
  constexpr int kColumns = kCount - kTaps + 1;
  Register m[kPoints] = {}, y[kOutputs], all{};
#pragma GCC unroll 6
  for (int p = 0; p < kCount; ++p) m[p] = V::load(sums + p * kL);
  winograd::transform_output<kCount == kPoints>(m, y);
  const Register bias = V::load(tile.bias);
#pragma GCC unroll 4
  for (int j = 0; j < kColumns; ++j) {
    if (!tile.stream) __builtin_prefetch(dst + tile.dst_row * 2 + j * tile.dst_column, 1, 3);
    all += y[j];
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
  return all * 0.0f;
}

template <int kCount>
bool run(const GroupWinogradTile& tile) {
  const int64_t source_rows = tile.rows + kTaps - 1;
  float* const rows = tile.scratch;
  float* const sums = rows + (round_up(tile.rows, kRows) + kTaps - 1) * kRow;
  // Tiles have two rows of outputs.
  for (int64_t s = 0; s < source_rows + tile.rows % 2; ++s)
    transform_row<kCount>(tile.src, s, rows + s * kRow);
  const bool permutes = tile.lanes != nullptr;
  const auto multiply = permutes ? multiply_permuted<kTiles> : multiply_exchanged<kTiles>;
  const auto multiply_last = permutes ? multiply_permuted<1> : multiply_exchanged<1>;
  const float* w = tile.weights;
  for (int64_t p = 0; p < kCount; ++p, w += tile.channels * kDown * kL)
    for (int64_t i = 0; i < tile.rows; i += kRows) {
      tile.fetch->ask(tile.lines);
      const int64_t at = i * kRow + p * kL;
      (tile.rows - i > 2 ? multiply : multiply_last)(tile, w, rows + at, sums + at);
    }
  Register special{};
  for (int64_t r = 0; r < tile.rows; ++r)
    special += finish_row<kCount>(tile, sums + r * kRow, tile.dst + r * tile.dst_row);
  bool finite = true;
  for (int l = 0; l < kL; ++l) finite &= special[l] == 0;
  return finite;
}

}  // namespace

bool group_winograd_tile(const GroupWinogradTile& tile) {
  return tile.full ? run<kPoints>(tile) : run<kPoints - 1>(tile);
}
#else
bool group_winograd_tile(const GroupWinogradTile&) { std::abort(); }
#endif

}  // namespace torchconv::cpu
