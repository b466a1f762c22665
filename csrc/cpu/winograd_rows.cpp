// First layers, and the input gradients of last ones: with few channels the tiles of F(4x4,3x3)
// have too few products to pay for their transforms, which both sides do in two dimensions. Along
// the rows only, and with the products of all rows and channels summed before the inverse
// transform, four outputs take 6 products for each channel and three taps of a row instead of 12,
// and nothing of a tile leaves the registers (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2015, whose F(m, r) nests with any sum). Longer rows of taps, and those of each
// phase of a stride, are groups of three, two or one taps that add to the same sums.
//
// A task is a block of rows of a sample: it transforms what they read of the source once, as planes
// [row][channel][point][tile], and multiplies it with vectors of filters
// [vector][term][point][filter]. For NCHW vectors run along the tiles of a row instead, a few
// filters at a time, and what is left to do is to interleave the four outputs of a tile; with too
// few tiles for that, the square of pixels and filters is transposed on its way out.
#include "cpu/winograd_rows.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"
#include "cpu/special_samples.h"
#include "cpu/winograd_rows_points.h"
#include "cpu/winograd_rows_terms.h"
#include "cpu/winograd_rows_tile.h"

namespace torchconv::cpu {
namespace {

namespace rows = winograd::rows;
using rows::kMostPoints;
using rows::kMostTaps;
using rows::kOutputs;
using rows::kPixels;
using rows::kTiles;
using rows::points_of;
using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;

// Or of two vectors of filters, where registers hold more than one tile of both.
constexpr int kPairTiles = kTiles / 2;

// Rows that a task reads beyond its own, and the taps of a row.
constexpr int64_t kMostHalo = 16, kMostStep = 4, kMostColumns = 32;
// Terms of a sum, for the bound on its error.
constexpr int64_t kMostTerms = 1024;
constexpr int64_t kSourceBytes = 256 << 10;
constexpr int64_t kTasksWanted = 12;

struct RowTile : rows::RowOutputs {
  const float* v;  // of the first tile
  int64_t plane;   // from a point to the next
  const int64_t* offsets;
  int64_t terms[kMostTaps];  // of three taps, of two and of one, in this order
  const float* u;
  int64_t next_vector;  // of filters, in u
  const float* bias;    // as the first points
  int64_t ahead;        // from dst to where the tile's place in the next row is
};

// The products of terms of kTaps taps, from `offsets` and `u`, which it leaves at those that
// follow: of kWide tiles and vectors of filters, or of kWide filters and a vector of tiles.
template <int kTaps, bool kAlongTiles, int kVectors, int kWide>
TORCHCONV_INLINE void add_terms(const RowTile& tile, const int64_t*& offsets, const float*& u,
                                Register (&sum)[kVectors][kWide][kMostPoints]) {
  static_assert(!kAlongTiles || kVectors == 1);
  constexpr int kPoints = points_of(kTaps);
  const int64_t plane = tile.plane, terms = tile.terms[kMostTaps - kTaps];
#pragma GCC unroll 2
  for (int64_t k = 0; k < terms; ++k, u += rows::weights_of(kTaps) * kL) {
    const float* const v0 = tile.v + *offsets++;
    const float* const v3 = v0 + 3 * plane;
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) {
      const float* const tiles = p < 3 ? v0 + p * plane : v3 + (p - 3) * plane;
      const float* const filters = kTaps == 1 ? u : u + p * kL;
      Register vector[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        vector[v] = V::load(kAlongTiles ? tiles : filters + v * tile.next_vector);
      if constexpr (kAlongTiles) keep_in_register(vector[0]);
      const float* const each = kAlongTiles ? filters : tiles;
#pragma GCC unroll 4
      for (int t = 0; t < kWide; ++t) {
        const Register x = V::broadcast(each[t]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[v][t][p] += x * vector[v];
      }
    }
  }
}

// Returns a vector with a NaN where a sum is not finite.
template <bool kTransposed, int kVectors, int kWide>
Register multiply(const RowTile& tile) {
  constexpr int kCount = kWide * kOutputs;
  Register sum[kVectors][kWide][kMostPoints];
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 6
    for (int p = 0; p < kMostPoints; ++p) {
      const Register bias =
          p < points_of(1) ? V::load(tile.bias + (v * points_of(1) + p) * kL) : Register{};
#pragma GCC unroll 4
      for (int t = 0; t < kWide; ++t) sum[v][t][p] = bias;
    }

  // What the next tile overwrites, or where filters lie apart the same one of the next row.
  if (!tile.stream) {
    const int64_t row = kTransposed ? tile.dst_c : tile.dst_column;
    const float* ahead = tile.dst + (kTransposed ? tile.ahead : kCount * tile.dst_column);
#pragma GCC unroll 4
    for (int i = 0; i < (kTransposed ? kL : kCount); ++i, ahead += row)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(ahead + v * kL, 1, 3);
  }
  const float* u = tile.u;
  const int64_t* offsets = tile.offsets;
  add_terms<3, false>(tile, offsets, u, sum);
  add_terms<2, false>(tile, offsets, u, sum);
  add_terms<1, false>(tile, offsets, u, sum);

  if constexpr (kVectors == 1) return rows::store_outputs<kTransposed>(tile, sum[0]);
  // All but the last vector are whole.
  rows::RowOutputs to = tile;
  auto special = Register{};
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v, to.dst += kL) {
    to.filters = v + 1 < kVectors ? kL : tile.filters - v * kL;
    special += rows::store_outputs<kTransposed>(to, sum[v]);
  }
  return special;
}

// kTiles filters of a vector of tiles: u and bias are those of the first, v of the first tile.
__attribute__((noinline)) Register multiply_planes(const RowTile& tile) {
  Register sum[1][kTiles][kMostPoints];
#pragma GCC unroll 6
  for (int p = 0; p < kMostPoints; ++p)
#pragma GCC unroll 4
    for (int f = 0; f < kTiles; ++f)
      sum[0][f][p] = p < points_of(1) ? V::broadcast(tile.bias[p * kL + f]) : Register{};
  // What the same tile of the next row overwrites.
  if (!tile.stream) {
    const float* ahead = tile.dst + tile.ahead;
#pragma GCC unroll 4
    for (int f = 0; f < kTiles; ++f, ahead += tile.dst_c)
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) __builtin_prefetch(ahead + i * kL, 1, 3);
  }
  const float* u = tile.u;
  const int64_t* offsets = tile.offsets;
  add_terms<3, true>(tile, offsets, u, sum);
  add_terms<2, true>(tile, offsets, u, sum);
  add_terms<1, true>(tile, offsets, u, sum);

  auto special = Register{};
  const Register low{}, high = V::broadcast(tile.high);
#pragma GCC unroll 4
  for (int f = 0; f < kTiles; ++f) {
    Register y[kOutputs], even[2], odd[2];
    rows::transform_output(sum[0][f], y);
    special += ((y[0] + y[1]) + (y[2] + y[3])) * Register{};
    interleave<float>(y[0], y[2], &even[0], &even[1]);
    interleave<float>(y[1], y[3], &odd[0], &odd[1]);
    interleave<float>(even[0], odd[0], &y[0], &y[1]);
    interleave<float>(even[1], odd[1], &y[2], &y[3]);
    if (f >= tile.filters) continue;
    float* const dst = tile.dst + f * tile.dst_c;
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
      if (tile.clamp) {
        y[i] = y[i] < low ? low : y[i];
        y[i] = y[i] > high ? high : y[i];
      }
      const int64_t pixels = tile.pixels - i * kL;
      if (pixels >= kL)
        WideVec<float>::store(dst + i * kL, y[i], tile.stream);
      else if (pixels > 0)
        V::store_partial(dst + i * kL, y[i], pixels);
    }
  }
  return special;
}

// Columns of a row of taps.
int64_t columns_of(const ConvView& view) {
  const Range span = tap_span(view, &ConvTap::w);
  return span.size();
}

// Of the tiles of a row, those in narrow register tiles, so that none is in vain; or none.
int64_t tiles_of_narrow(int64_t tiles) {
  const int64_t narrow = (round_up(tiles, kTiles) - tiles) * (kTiles - 1);
  return narrow <= tiles ? narrow : 0;
}

// Whether rows of outputs lie without gaps, so that an activation that takes more than clamping is
// applied to whole ones where they are, while they are in cache.
bool activates_rows(const ConvView& view, const Epilogue<float>& epilogue) {
  return epilogue.activates_only() && !epilogue.clamps_at_most() && view.dst.c == 1 &&
         view.dst.column == view.K;
}

// What is left of the epilogue for a tile.
Epilogue<float> of_tiles(const ConvView& view, const Epilogue<float>& epilogue) {
  Epilogue<float> left = epilogue;
  if (activates_rows(view, epilogue)) left.activation = Activation::kNone;
  return left;
}

class WinogradRows {
 public:
  WinogradRows(const ConvView& view, const float* src, const float* w, const float* bias,
               const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(of_tiles(view, epilogue)),
        activation_(activates_rows(view, epilogue) ? epilogue.activation : Activation::kNone),
        terms_(view),
        tiles_(ceil_div(view.J, kOutputs)),
        plane_(round_up(round_up(tiles_, kTiles), kL)),
        source_(view, plane_),
        source_row_(view.C * source_.channel()),
        vectors_(ceil_div(view.K, kL)),
        weights_(terms_.weights()),
        u_(vectors_ * weights_ * kL),
        bias_(rows::bias_points(bias, view.K)),
        special_(view.N),
        offsets_(terms_.offsets<int64_t>(source_row_, source_.channel(), plane_)),
        outputs_(rows::outputs_of(view, epilogue_)),
        direct_(rows::stores_directly(view, epilogue_)) {
    const bool transposed = view.dst.c != 1;
    if (activation_ != Activation::kNone) outputs_.stream = false;  // they are read again
    // The products of a filter in vain against what its outputs save of the transposition's steps.
    const int64_t in_vain = round_up(tiles_, kL) - tiles_;
    const auto terms = static_cast<int64_t>(terms_.rows().size()) * source_row_ / plane_;
    along_tiles_ =
        direct_ && transposed && 4 * in_vain <= tiles_ && 2 * terms * in_vain <= kL * tiles_;
    transform_weights(w);
    const int64_t halo = terms_.halo();
    const int64_t affordable = kSourceBytes / (source_row_ * static_cast<int64_t>(sizeof(float)));
    block_rows_ = std::max(ceil_div(view.I, ceil_div(kTasksWanted, view.N)), 2 * halo);
    block_rows_ = std::min(block_rows_, (affordable - halo) / view.step_h);
    block_rows_ = std::clamp<int64_t>(block_rows_, 1, view.I);
    source_rows_ = (block_rows_ - 1) * view.step_h + halo + 1;
  }

  std::vector<int64_t> run(const Parallel& pool) {
    const int64_t blocks = ceil_div(view_.I, block_rows_);
    const WorkSplit split(view_.N * blocks, 1.5 * static_cast<double>(block_rows_ * view_.J) *
                                                static_cast<double>(vectors_ * kL * weights_));
    // What a task reads, what a row of it needs on the way, and a tile of outputs.
    const int64_t source = round_up(source_rows_ * source_row_, 16);
    const int64_t row = round_up(source_.scratch_size(), 16);
    const int64_t outputs = kPixels * kL;
    const int64_t slot_size = source + row + outputs;
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* v = scratch.get() + slot * slot_size;
      source_.prepare(v + source);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i0 = task % blocks * block_rows_, n = task / blocks;
        const Range i{i0, std::min(i0 + block_rows_, view_.I)};
        transform_source(n, i, v, v + source);
        if (!multiply_block(n, i, v, v + source + row)) special_.add(n);
        if (activation_ != Activation::kNone) activate_block(n, i);
      }
      if (outputs_.stream) stream_fence();
    });
    return special_.list();
  }

 private:
  void transform_weights(const float* w) {
    float* u = u_.get();
    for (int64_t k = 0; k < view_.K; k += kL)
      terms_.for_weights(view_, w, k, [&](int64_t, int taps, const Register* points) {
        for (int p = 0; p < rows::weights_of(taps); ++p, u += kL) V::store(u, points[p]);
      });
  }

  void transform_source(int64_t n, Range i, float* v, float* scratch) const {
    const int64_t count = (i.size() - 1) * view_.step_h + terms_.halo() + 1;
    const int64_t first = i.begin * view_.step_h + terms_.rows().front();
    for (int64_t y = 0; y < count; ++y)
      source_.transform(src_ + n * view_.src.n, first + y, scratch, v + y * source_row_);
  }

  void activate_block(int64_t n, Range i) const {
    float* row = epilogue_.y + view_.dst_offset + n * view_.dst.n + i.begin * view_.dst.row;
    for (int64_t y = 0; y < i.size(); ++y, row += view_.dst.row)
      activate(activation_, row, row, view_.J * view_.K);
  }

  // False where a sum is not finite.
  bool multiply_block(int64_t n, Range i, const float* v, float* outputs) const {
    const bool transposed = view_.dst.c != 1;
    auto special = Register{};
    RowTile tile{};
    static_cast<rows::RowOutputs&>(tile) = outputs_;
    tile.plane = plane_;
    tile.offsets = offsets_.data();
    tile.next_vector = weights_ * kL;
    for (int taps = 1; taps <= kMostTaps; ++taps)
      tile.terms[kMostTaps - taps] = terms_.of_taps(taps);
    if constexpr (kPairTiles > 1)
      if (direct_ && !transposed && view_.K > kL)
        return !rows::has_nan(multiply_pairs(n, i, v, tile));
    const auto tall = transposed ? multiply<true, 1, kTiles> : multiply<false, 1, kTiles>;
    const auto narrow = transposed ? multiply<true, 1, kTiles - 1> : multiply<false, 1, kTiles - 1>;
    const int64_t narrow_tiles = tiles_of_narrow(tiles_);
    const auto multiply_row = [&](int64_t y, int64_t k) {
      const int64_t row =
          view_.dst_offset + n * view_.dst.n + (i.begin + y) * view_.dst.row + k * view_.dst.c;
      tile.u = u_.get() + k * weights_;
      tile.bias = bias_.get() + k * points_of(1);
      tile.filters = std::min<int64_t>(view_.K - k, kL);
      tile.ahead = y + 1 < i.size() ? view_.dst.row : kL * view_.dst.c - y * view_.dst.row;
      if (along_tiles_) {
        for (int64_t f = 0; tile.filters > 0; f += kTiles) {
          for (int64_t t = 0; t < tiles_; t += kL) {
            tile.v = v + y * view_.step_h * source_row_ + t;
            tile.pixels = view_.J - t * kOutputs;
            tile.dst = epilogue_.y + row + f * view_.dst.c + t * kOutputs;
            special += multiply_planes(tile);
          }
          tile.u += kTiles;
          tile.bias += kTiles;
          tile.filters -= kTiles;
        }
        return;
      }
      for (int64_t t = 0, wide; t < tiles_; t += wide) {
        wide = t < tiles_ - narrow_tiles ? kTiles : kTiles - 1;
        const int64_t dst = row + t * kOutputs * view_.dst.column;
        tile.v = v + y * view_.step_h * source_row_ + t;
        tile.pixels = std::min<int64_t>(view_.J - t * kOutputs, wide * kOutputs);
        tile.dst = direct_ ? epilogue_.y + dst : outputs;
        special += wide == kTiles ? tall(tile) : narrow(tile);
        if (!direct_) rows::store_scratch(tile, view_, epilogue_, dst);
      }
    };
    // Destinations almost in the order of memory.
    const int64_t rows = transposed ? i.size() : 1;
    for (int64_t first = 0; first < i.size(); first += rows)
      for (int64_t k = 0; k < view_.K; k += kL)
        for (int64_t y = first; y < first + rows; ++y) multiply_row(y, k);
    return !rows::has_nan(special);
  }

  // For channels_last, pairs of vectors of filters, for both of which a tile is loaded once: as
  // many loads as products, where one vector takes five for every four. All filters of a pixel
  // together, since their weights are near.
  Register multiply_pairs(int64_t n, Range i, const float* v, RowTile tile) const {
    auto special = Register{};
    for (int64_t y = 0; y < i.size(); ++y)
      for (int64_t t = 0; t < tiles_; t += kPairTiles) {
        const bool full = t + kPairTiles <= tiles_;
        tile.v = v + y * view_.step_h * source_row_ + t;
        tile.pixels = view_.J - t * kOutputs;
        if (full) tile.pixels = std::min<int64_t>(tile.pixels, kPairTiles * kOutputs);
        float* const dst = epilogue_.y + view_.dst_offset + n * view_.dst.n +
                           (i.begin + y) * view_.dst.row + t * kOutputs * view_.dst.column;
        for (int64_t k = 0; k < view_.K; k += 2 * kL) {
          tile.u = u_.get() + k * weights_;
          tile.bias = bias_.get() + k * points_of(1);
          tile.filters = std::min<int64_t>(view_.K - k, 2 * kL);
          tile.dst = dst + k;
          special +=
              (tile.filters > kL ? full ? multiply<false, 2, kPairTiles> : multiply<false, 2, 1>
               : full            ? multiply<false, 1, kPairTiles>
                                 : multiply<false, 1, 1>)(tile);
        }
      }
    return special;
  }

  const ConvView& view_;
  const float* src_;
  const Epilogue<float> epilogue_;
  const Activation activation_;  // of whole rows, behind the epilogue
  rows::Terms terms_;
  int64_t tiles_, plane_;
  rows::Source source_;
  int64_t source_row_;
  int64_t vectors_;
  int64_t weights_;     // vectors of them for a vector of filters
  Buffer<float> u_;     // [vectors][group, row, channel][point][filter]
  Buffer<float> bias_;  // [filter]
  SpecialSamples special_;
  std::vector<int64_t> offsets_;  // [group, row, channel], in the transformed source
  rows::RowOutputs outputs_;
  bool direct_;       // the kernel applies the epilogue
  bool along_tiles_;  // vectors, instead of along filters
  int64_t block_rows_, source_rows_;
};

}  // namespace

bool winograd_rows_applies(const ConvView& view) {
  if (view.groups != 1 || view.step_w > kMostStep || view.taps.empty()) return false;
  const std::vector<int64_t> rows = distinct_offsets(view, &ConvTap::h);
  const std::vector<int64_t> columns = distinct_offsets(view, &ConvTap::w);
  const auto count = static_cast<int64_t>(columns.size());
  const auto groups = static_cast<int64_t>(rows::tap_groups(count, view.step_w).size());
  return count == columns_of(view) && count <= kMostColumns &&
         view.taps.size() == rows.size() * columns.size() &&
         static_cast<int64_t>(rows.size()) * view.C * groups <= kMostTerms &&
         rows.back() - rows.front() <= kMostHalo && view.step_h <= kMostHalo &&
         4 * rows::planes_of(rows::tap_groups(count, view.step_w)) <= 3 * kOutputs * count;
}

double winograd_rows_products(const ConvView& view) {
  const int64_t columns = columns_of(view), tiles = ceil_div(view.J, kOutputs);
  const int64_t computed = tiles_of_narrow(tiles) > 0 ? tiles : round_up(tiles, kTiles);
  return static_cast<double>(computed * rows::planes_of(rows::tap_groups(columns, view.step_w))) /
         static_cast<double>(view.J * columns);
}

std::vector<int64_t> winograd_rows(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool) {
  if (rows::points_apart(view)) return rows::gather_points(view, src, w, bias, epilogue, pool);
  return WinogradRows(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
