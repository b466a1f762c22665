// A step is four rows of outputs, two tiles one below the other, and goes through the points of the
// rows one by one: between the products of two of them a source row of the next step is
// transformed, and a row of the last step's outputs, so that no kind of instruction waits for
// another. The points of the columns stay in registers.
#include "cpu/microkernels/group_winograd.h"

#include <cstdlib>
#include <utility>

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
constexpr int64_t kRow = kPoints * kL;

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

// One point of the rows: of kCount tiles from four rows at `upper` and two at `lower` to kCount * 2
// rows at `to`.
template <int kCount>
TORCHCONV_INLINE void multiply_point(const float* w, int64_t quarters, const float* upper,
                                     const float* lower, float* to) {
  Register r[2 * kCount + 2], v[kCount][kDown], sums[kCount][kDown];
#pragma GCC unroll 6
  for (int i = 0; i < 2 * kCount + 2; ++i)
    r[i] = V::load(i < 4 ? upper + i * kRow : lower + (i - 4) * kRow);
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    v[t][0] = r[2 * t] - r[2 * t + 2];
    v[t][1] = r[2 * t + 1] + r[2 * t + 2];
    v[t][2] = r[2 * t + 2] - r[2 * t + 1];
    v[t][3] = r[2 * t + 1] - r[2 * t + 3];
#pragma GCC unroll 4
    for (int q = 0; q < kDown; ++q) sums[t][q] = Register{};
  }
  for (int64_t quarter = 0;;) {
    add_channel<0, kCount>(w, v, sums);
    add_channel<1, kCount>(w, v, sums);
    add_channel<2, kCount>(w, v, sums);
    add_channel<3, kCount>(w, v, sums);
    if (++quarter == quarters) break;
    w += kQuarter * kDown * kL;
    const bool odd = quarter % 2 != 0;
#pragma GCC unroll 2
    for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
      for (int q = 0; q < kDown; ++q) v[t][q] = odd ? exchange<4>(v[t][q]) : exchange<12>(v[t][q]);
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    V::store(to + 2 * t * kRow, sums[t][0] + (sums[t][1] + sums[t][2]));
    V::store(to + (2 * t + 1) * kRow, (sums[t][1] - sums[t][2]) - sums[t][3]);
  }
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
    if (!tile.stream) __builtin_prefetch(dst + tile.dst_row * kRows + j * tile.dst_column, 1, 3);
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
  // Source rows in turn, four of them each; and outputs of two steps.
  alignas(64) float rows[3][4 * kRow], outputs[2][kRows * kRow];
  float *upper = rows[0], *lower = rows[1], *next = rows[2];
  float *sums = outputs[0], *finished = outputs[1];
  const int64_t source_rows = tile.rows + kTaps - 1;
  const int64_t point = tile.quarters * kQuarter * kDown * kL;
  Register special{};
  for (int64_t s = 0; s < kRows + 2; ++s)
    transform_row<kCount>(tile.src, s, (s < 4 ? upper : lower) + s % 4 * kRow);
  for (int64_t i = 0; i < tile.rows; i += kRows) {
    const float* w = tile.weights;
    tile.fetch->ask(tile.lines);
    for (int64_t p = 0; p < kCount; ++p, w += point) {
      if (tile.rows - i > 2)
        multiply_point<kTiles>(w, tile.quarters, upper + p * kL, lower + p * kL, sums + p * kL);
      else
        multiply_point<1>(w, tile.quarters, upper + p * kL, lower + p * kL, sums + p * kL);
      if (p >= kRows) continue;
      const int64_t s = i + kRows + 2 + p;
      if (s < source_rows)
        transform_row<kCount>(tile.src, s, p < 2 ? lower + (2 + p) * kRow : next + (p - 2) * kRow);
      if (i > 0)
        special += finish_row<kCount>(tile, finished + p * kRow,
                                      tile.dst + (i - kRows + p) * tile.dst_row);
    }
    std::swap(sums, finished);
    float* const free = upper;
    upper = lower, lower = next, next = free;
  }
  const int64_t last = (tile.rows - 1) / kRows * kRows;
  for (int64_t r = last; r < tile.rows; ++r)
    special += finish_row<kCount>(tile, finished + (r - last) * kRow, tile.dst + r * tile.dst_row);
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
