// Some rows of outputs are computed tile by tile, so that neighbours are read and written one after
// the other: below each other, pixels of many channels share few sets of the first-level cache. The
// points of the last source rows wait for the next outputs; those of the columns do not leave the
// registers.
#include "cpu/microkernels/group_winograd.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/microkernels/group_winograd_columns.h"
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

// The points of rows [first, first + count) of the source, from a tile's first column on, to slots
// of a ring. kEdge: where some of them lie beside the image, or lanes do.
template <int kCount, bool kEdge>
TORCHCONV_INLINE void transform_rows(const GroupWinogradBand& band, int64_t first, int64_t count,
                                     int64_t column, const int64_t* slots, float* ring) {
  const int64_t row = band.src_row, next = band.src_column, ahead = band.ahead;
  const Range inside = band.src_rows;
  const float* src = band.src + first * row + column * next;
  for (int64_t r = 0; r < count; ++r, src += row) {
    Register d[kPoints] = {}, points[kPoints] = {};
    if (first + r >= inside.begin && first + r < inside.end) {
#pragma GCC unroll 6
      for (int s = 0; s < kCount; ++s) {
        if (!kEdge)
          d[s] = V::load(src + s * next);
        else if (column + s >= band.src_columns.begin && column + s < band.src_columns.end)
          d[s] = V::load_partial(src + s * next, band.src_used);
      }
      if (ahead != 0) {
#pragma GCC unroll 6
        for (int s = kTaps - 1; s < kCount; ++s) __builtin_prefetch(src + s * next + ahead, 0, 2);
      }
      winograd::transform_input<kCount == kPoints>(d, points);
    }
    float* const v = ring + slots[r];
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) V::store(v + p * kL, points[p]);
  }
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

// One point of the rows of kCount tiles, whose lanes are exchanged.
template <int kCount>
TORCHCONV_INLINE void multiply_exchanged(const GroupWinogradBand& band, const float* w,
                                         const float* points, const int64_t* rows, float* to) {
  Register v[kCount][kDown], sums[kCount][kDown] = {};
  transform_columns(points, rows, v);
  for (int64_t c = 0;;) {
    add_channel<0, kCount>(w, v, sums);
    add_channel<1, kCount>(w, v, sums);
    add_channel<2, kCount>(w, v, sums);
    add_channel<3, kCount>(w, v, sums);
    c += kQuarter;
    if (c >= band.channels) break;
    w += kQuarter * kDown * kL;
    const bool odd = c / kQuarter % 2 != 0;
#pragma GCC unroll 2
    for (int t = 0; t < kCount; ++t) {
#pragma GCC unroll 4
      for (int q = 0; q < kDown; ++q) v[t][q] = odd ? exchange<4>(v[t][q]) : exchange<12>(v[t][q]);
    }
  }
  finish_columns(sums, to, kRow);
}

// The same for any lanes.
template <int kCount>
TORCHCONV_INLINE void multiply_permuted(const GroupWinogradBand& band, const float* w,
                                        const float* points, const int64_t* rows, float* to) {
  Register v[kCount][kDown], sums[kCount][kDown] = {};
  transform_columns(points, rows, v);
  Lanes lanes = Vec<LaneIndex<float>>::load(band.lanes);
  for (int64_t c = 0; c < band.channels; ++c, lanes += 1, w += kDown * kL) {
#pragma GCC unroll 4
    for (int q = 0; q < kDown; ++q) {
      Register filters = V::load(w + q * kL);
      keep_in_register(filters);
#pragma GCC unroll 2
      for (int t = 0; t < kCount; ++t) sums[t][q] += permute(v[t][q], lanes) * filters;
    }
  }
  finish_columns(sums, to, kRow);
}

// Rows of a tile's outputs. Returns a vector with a NaN where one, before its bias, is not finite.
template <int kCount, bool kWhole, bool kStream>
Register finish_rows(const GroupWinogradBand& band, const float* sums, int64_t rows,
                     int64_t columns, float* dst) {
  constexpr int kColumns = kCount - kTaps + 1;
  const Register bias = V::load(band.bias), high = V::broadcast(band.high);
  const bool clamp = band.clamp;
  const int64_t next = band.dst_column, used = band.used;
  Register all{};
  for (int64_t r = 0; r < rows; ++r, sums += kRow, dst += band.dst_row) {
    Register m[kPoints] = {}, y[kOutputs];
#pragma GCC unroll 6
    for (int p = 0; p < kCount; ++p) m[p] = V::load(sums + p * kL);
    winograd::transform_output<kCount == kPoints>(m, y);
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      all += y[j];
      y[j] += bias;
    }
    if (clamp) {
#pragma GCC unroll 4
      for (int j = 0; j < kColumns; ++j) y[j] = clamped(y[j], high);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kColumns; ++j) {
      if (kWhole)
        WideVec<float>::store(dst + j * next, y[j], kStream);
      else if (j < columns)
        V::store_partial(dst + j * next, y[j], used);
    }
  }
  return all * 0.0f;
}

// How many rows of outputs are computed together, of how many tiles, whose source rows' points wait
// in rings: with many channels, whose weights fill half of the first-level cache, more rows share a
// point's weights.
struct Strip {
  int64_t rows, tiles;
  constexpr int64_t ring() const { return rows + kTaps - 1; }
  constexpr int64_t size() const { return (tiles * ring() + rows) * kRow; }
};
constexpr Strip kFewChannels{kRows, 8}, kManyChannels{2 * kRows, 4};
static_assert(std::max(kFewChannels.size(), kManyChannels.size()) <= kGroupWinogradScratch);

// Outputs [i, i + rows) of a tile. slots: of source rows from i on.
template <int kCount, bool kPermutes>
Register run_tile(const GroupWinogradBand& band, int64_t i, int64_t rows, int64_t tile, float* ring,
                  const int64_t* slots, float* sums) {
  const int64_t j = band.tiles->begin(tile), outputs = band.tiles->outputs_of(tile);
  float* const dst = band.dst + i * band.dst_row + j * band.dst_column;
  const bool edge =
      j < band.src_columns.begin || j + kCount > band.src_columns.end || band.src_used < kL;
  const int64_t first = i == 0 ? 0 : kTaps - 1,
                count = round_up(rows, int64_t{2}) + kTaps - 1 - first;
  const auto transform = edge ? transform_rows<kCount, true> : transform_rows<kCount, false>;
  transform(band, i + first, count, j, slots + first, ring);
  const float* next_src =
      band.src + (i + kTaps - 1) * band.src_row + (j + kCount) * band.src_column;
  const float* next_dst = dst + outputs * band.dst_column;
  const float* w = band.weights;
  for (int64_t p = 0; p < kCount; ++p, w += band.channels * kDown * kL) {
    if (p < rows && band.ahead != 0) {
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) __builtin_prefetch(next_src + o * band.src_column, 0, 3);
      if (!band.stream) {
#pragma GCC unroll 4
        for (int o = 0; o < kOutputs; ++o) __builtin_prefetch(next_dst + o * band.dst_column, 1, 3);
      }
      next_src += band.src_row;
      next_dst += band.dst_row;
    }
    for (int64_t r = 0; r < rows; r += kRows) {
      band.fetch->ask(band.lines);
      const float* const points = ring + p * kL;
      float* const to = sums + r * kRow + p * kL;
      if (kPermutes && rows - r > 2)
        multiply_permuted<kTiles>(band, w, points, slots + r, to);
      else if (kPermutes)
        multiply_permuted<1>(band, w, points, slots + r, to);
      else if (rows - r > 2)
        multiply_exchanged<kTiles>(band, w, points, slots + r, to);
      else
        multiply_exchanged<1>(band, w, points, slots + r, to);
    }
  }
  const bool whole = band.used == kL && outputs == kCount - kTaps + 1;
  const auto finish = !whole        ? finish_rows<kCount, false, false>
                      : band.stream ? finish_rows<kCount, true, true>
                                    : finish_rows<kCount, true, false>;
  return finish(band, sums, rows, outputs, dst);
}

}  // namespace

bool group_winograd_rows(const GroupWinogradBand& band) {
  const Strip strip = band.channels > 2 * kGroupQuarter ? kManyChannels : kFewChannels;
  const int64_t ring = strip.ring(), pieces = ceil_div(band.tiles->count, strip.tiles);
  float* const sums = band.scratch + strip.tiles * ring * kRow;
  Register special{};
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t begin = piece * band.tiles->count / pieces,
                  end = (piece + 1) * band.tiles->count / pieces;
    for (int64_t i = 0; i < band.rows; i += strip.rows) {
      int64_t slots[kManyChannels.ring()];
      for (int64_t r = 0; r < ring; ++r) slots[r] = (i + r) % ring * kRow;
      const int64_t rows = std::min(strip.rows, band.rows - i);
      for (int64_t t = begin; t < end; ++t) {
        const bool full = band.tiles->is_full(t);
        const auto run = band.lanes == nullptr
                             ? (full ? run_tile<kPoints, false> : run_tile<kPoints - 1, false>)
                             : (full ? run_tile<kPoints, true> : run_tile<kPoints - 1, true>);
        special += run(band, i, rows, t, band.scratch + (t - begin) * ring * kRow, slots, sums);
      }
    }
  }
  const auto lanes = special != special;
  int64_t any = 0;
  for (int l = 0; l < kL; ++l) any |= lanes[l];
  return any == 0;
}
#else
bool group_winograd_rows(const GroupWinogradBand&) { std::abort(); }
#endif

}  // namespace torchconv::cpu
