// First layers, and the input gradients of last ones: with few channels the tiles of F(4x4,3x3)
// have too few products to pay for their transforms, which both sides do in two dimensions. Along
// the rows only, and with the products of all rows and channels summed before the inverse
// transform, four outputs take 6 products for each channel and row of taps instead of 12, and
// nothing of a tile leaves the registers (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2015, whose F(m, r) nests with any sum).
//
// A task is a block of rows of a sample: it transforms what they read of the source once, as planes
// [row][channel][point][tile], and multiplies it with vectors of filters
// [vector][term][point][filter]. For NCHW the square of pixels and filters is transposed in
// registers on its way out.
#include "cpu/winograd_rows.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "core/buffer.h"
#include "cpu/axis_groups.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"
#include "cpu/winograd_rows_source.h"

namespace torchconv::cpu {
namespace {

namespace rows = winograd::rows;
using rows::kMostPoints;
using rows::kMostTaps;
using rows::kOutputs;
using rows::points_of;
using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;
using Half = Vec<float, kL / 2>;

// Tiles times vectors of filters whose products are in registers. Two vectors share the loads of
// points, which would else take longer than the products.
constexpr int kTiles = kVectorBytes == 64 ? 4 : 2, kMostVectors = 2;
// Their pixels: of one vector of filters a whole number of vectors.
constexpr int pixels_of(int vectors) { return kTiles / vectors * kOutputs; }
constexpr int kPixels = pixels_of(1);

// Rows that a task reads beyond its own, and the taps of a row.
constexpr int64_t kMostHalo = 16, kMostStep = 4, kMostColumns = 32;
constexpr int64_t kSourceBytes = 256 << 10;
constexpr int64_t kTasksWanted = 12;
// With so few products to an output, stores that first read what they overwrite take longer than
// the products, from fewer bytes on than elsewhere (kStreamedBytes).
constexpr int64_t kStreamed = kStreamedBytes / 2 / static_cast<int64_t>(sizeof(float));

struct RowTile {
  const float* v;  // of the first tile
  int64_t plane;   // from a point to the next
  const int64_t* offsets;
  int64_t terms[kMostTaps];  // of three taps, of two and of one, in this order
  const float* u;
  const float* bias;  // as the first points
  bool stream;  // past the caches: every vector of dst aligned and whole, but for missing pixels
  bool clamp;   // to [0, high], NaN kept
  float high;
  float* dst;
  int64_t dst_c, dst_column;
  int64_t pixels, filters;  // that exist
};

// The products of terms of kTaps taps, from `offsets` and `u`, which it leaves at those that
// follow.
template <int kTaps, int kWide, int kVectors>
TORCHCONV_INLINE void add_terms(const RowTile& tile, const int64_t*& offsets, const float*& u,
                                Register (&sum)[kVectors][kWide][kMostPoints]) {
  constexpr int kPoints = points_of(kTaps);
  const int64_t plane = tile.plane;
  const int64_t terms = tile.terms[kMostTaps - kTaps];
#pragma GCC unroll 2
  for (int64_t k = 0; k < terms; ++k, u += rows::weights_of(kTaps) * kVectors * kL) {
    const float* const v0 = tile.v + *offsets++;
    const float* const v3 = v0 + 3 * plane;
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) {
      const float* v = p < 3 ? v0 + p * plane : v3 + (p - 3) * plane;
      Register filters[kVectors];
#pragma GCC unroll 2
      for (int f = 0; f < kVectors; ++f)
        filters[f] = V::load(u + ((kTaps == 1 ? 0 : p * kVectors) + f) * kL);
#pragma GCC unroll 4
      for (int t = 0; t < kWide; ++t) {
        const Register x = V::broadcast(v[t]);
#pragma GCC unroll 2
        for (int f = 0; f < kVectors; ++f) sum[f][t][p] += x * filters[f];
      }
    }
  }
}

template <int kFirst, int... I>
TORCHCONV_INLINE Half::Type lanes_from(Register v, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, (kFirst + I)...);
#else
  return {v[kFirst + I]...};
#endif
}
// The lower or the upper half of the lanes.
template <bool kUpper>
TORCHCONV_INLINE Half::Type half(Register v) {
  return lanes_from<kUpper ? kL / 2 : 0>(v, std::make_integer_sequence<int, kL / 2>());
}

// A tile whose vectors run along filters to dst, where these are neighbours.
template <int kVectors, int kCount>
TORCHCONV_INLINE void store_filters(const RowTile& tile, const Register (&y)[kVectors * kCount]) {
  const bool whole = tile.pixels == kCount && tile.filters == kVectors * kL;
  float* const dst = tile.dst;
  const int64_t column = tile.dst_column, pixels = tile.pixels;
  const bool stream = tile.stream;
#pragma GCC unroll 2
  for (int f = 0; f < kVectors; ++f) {
    const int64_t filters = std::min<int64_t>(tile.filters - f * kL, kL);
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) {
      float* const to = dst + p * column + f * kL;
      if (whole)
        WideVec<float>::store(to, y[f * kCount + p], stream);
      else if (p < pixels && filters > 0)
        V::store_partial(to, y[f * kCount + p], filters);
    }
  }
}

// Rows of pixels, of one filter each.
template <typename Row, typename RowOf>
TORCHCONV_INLINE void store_rows(float* dst, int64_t stride, int64_t pixels, int64_t filters,
                                 bool stream, const RowOf& row_of) {
  if (pixels >= Row::kLanes && filters >= kL) {
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) {
      if (Row::kLanes == kL && stream)
        stream_bytes(dst + i * stride, row_of(i));
      else
        Row::store(dst + i * stride, row_of(i));
    }
  } else if (pixels > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      if (i < filters)
        Row::store_partial(dst + i * stride, row_of(i), std::min<int64_t>(pixels, Row::kLanes));
  }
}

// Or where pixels are: through squares of whole vectors of pixels, or of half a vector of each of
// two vectors of filters.
template <int kVectors, int kCount>
TORCHCONV_INLINE void store_pixels(const RowTile& tile, const Register (&y)[kVectors * kCount]) {
#pragma GCC unroll 4
  for (int first = 0; first < kVectors * kCount; first += kL) {
    Register square[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) square[i] = y[first + i];
    transpose_steps<1>(square);
    if constexpr (kCount >= kL) {
      const int f = first / kCount * kL, pixel = first % kCount;
      store_rows<V>(tile.dst + f * tile.dst_c + pixel, tile.dst_c, tile.pixels - pixel,
                    tile.filters - f, tile.stream, [&](int i) { return square[i]; });
    } else {
      static_assert(2 * kCount == kL && kVectors == 2);
      store_rows<Half>(tile.dst, tile.dst_c, tile.pixels, tile.filters, false,
                       [&](int i) { return half<false>(square[i]); });
      store_rows<Half>(tile.dst + kL * tile.dst_c, tile.dst_c, tile.pixels, tile.filters - kL,
                       false, [&](int i) { return half<true>(square[i]); });
    }
  }
}

// Returns a vector with a NaN where a sum is not finite.
template <bool kTransposed, int kVectors>
Register multiply(const RowTile& tile) {
  constexpr int kWide = kTiles / kVectors, kCount = pixels_of(kVectors);
  Register sum[kVectors][kWide][kMostPoints];
#pragma GCC unroll 2
  for (int f = 0; f < kVectors; ++f)
#pragma GCC unroll 6
    for (int p = 0; p < kMostPoints; ++p) {
      const Register bias =
          p < points_of(1) ? V::load(tile.bias + (f * points_of(1) + p) * kL) : Register{};
#pragma GCC unroll 4
      for (int t = 0; t < kWide; ++t) sum[f][t][p] = bias;
    }

  // What the next tile overwrites.
  if (!tile.stream) {
    constexpr int kRows = kTransposed ? kVectors * kL : kCount;
    const int64_t row = kTransposed ? tile.dst_c : tile.dst_column;
    const float* ahead = tile.dst + kCount * tile.dst_column;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i, ahead += row) {
      __builtin_prefetch(ahead, 1, 3);
      if (!kTransposed && kVectors > 1) __builtin_prefetch(ahead + kVectors * kL - 1, 1, 3);
    }
  }
  const float* u = tile.u;
  const int64_t* offsets = tile.offsets;
  add_terms<3>(tile, offsets, u, sum);
  add_terms<2>(tile, offsets, u, sum);
  add_terms<1>(tile, offsets, u, sum);

  // Of a tile's outputs together: at worst a large sum takes one for an overflow.
  auto special = Register{};
  Register y[kVectors * kCount];
#pragma GCC unroll 2
  for (int f = 0; f < kVectors; ++f)
#pragma GCC unroll 4
    for (int t = 0; t < kWide; ++t) {
      Register outputs[kOutputs];
      rows::transform_output(sum[f][t], outputs);
      special += ((outputs[0] + outputs[1]) + (outputs[2] + outputs[3])) * Register{};
#pragma GCC unroll 4
      for (int i = 0; i < kOutputs; ++i) y[f * kCount + t * kOutputs + i] = outputs[i];
    }
  if (tile.clamp) {
    const Register low{}, high = V::broadcast(tile.high);
#pragma GCC unroll 16
    for (int p = 0; p < kVectors * kCount; ++p) {
      y[p] = y[p] < low ? low : y[p];
      y[p] = y[p] > high ? high : y[p];
    }
  }
  if constexpr (kTransposed)
    store_pixels<kVectors, kCount>(tile, y);
  else
    store_filters<kVectors, kCount>(tile, y);
  return special;
}

bool has_nan(Register special) {
  float lanes[kL];
  V::store(lanes, special);
  return std::any_of(lanes, lanes + kL, [](float lane) { return lane != lane; });
}

int64_t weights_of(const std::vector<rows::TapGroup>& groups) {
  int64_t weights = 0;
  for (const rows::TapGroup& group : groups) weights += rows::weights_of(group.taps);
  return weights;
}

// Columns of a row of taps.
int64_t columns_of(const ConvView& view) {
  const Range span = tap_span(view, &ConvTap::w);
  return span.size();
}

class WinogradRows {
 public:
  WinogradRows(const ConvView& view, const float* src, const float* w, const float* bias,
               const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(epilogue),
        rows_(distinct_offsets(view, &ConvTap::h)),
        first_column_(tap_span(view, &ConvTap::w).begin),
        columns_(columns_of(view)),
        groups_(rows::tap_groups(columns_, view.step_w)),
        tiles_(ceil_div(view.J, kOutputs)),
        plane_(round_up(round_up(tiles_, kTiles), kL)),
        source_(view, plane_),
        source_row_(view.C * source_.channel()),
        vectors_(ceil_div(view.K, kL)),
        weights_(static_cast<int64_t>(rows_.size()) * view.C * weights_of(groups_)),
        u_(vectors_ * weights_ * kL),
        bias_(vectors_ * points_of(1) * kL),
        special_(new std::atomic<bool>[static_cast<size_t>(view.N)]()) {
    for (int64_t k = 0; k < vectors_ * kL; k += kL) {
      float lanes[kL] = {};
      if (bias != nullptr) std::copy_n(bias + k, std::min<int64_t>(view.K - k, kL), lanes);
      Register outputs[kOutputs], points[points_of(1)];
      std::fill_n(outputs, kOutputs, V::load(lanes));
      rows::transform_input<1>(outputs, points);
      for (int p = 0; p < points_of(1); ++p)
        V::store(bias_.get() + k * points_of(1) + p * kL, points[p]);
    }
    for (const rows::TapGroup& group : groups_) {
      const int64_t terms = static_cast<int64_t>(rows_.size()) * view.C;
      terms_[kMostTaps - group.taps] += terms;
      for (const int64_t h : rows_)
        for (int64_t c = 0; c < view.C; ++c)
          offsets_.push_back((h - rows_[0]) * source_row_ + c * source_.channel() +
                             group.plane * plane_);
    }
    const Activation activation = epilogue.activation;
    direct_ = epilogue.preactivation == nullptr &&
              (activation == Activation::kNone || activation == Activation::kReLU ||
               activation == Activation::kReLU6);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const bool transposed = view.dst.c != 1;
    streams_ = direct_ && (transposed ? view.dst.c : view.dst.column) % kL == 0 &&
               view.dst.row % kL == 0 && WideVec<float>::streamable(epilogue.y + view.dst_offset) &&
               view.N * view.pixels() * view.K >= kStreamed;
    transform_weights(w);
    clamp_ = direct_ && activation != Activation::kNone;
    high_ = activation == Activation::kReLU6 ? 6 : kInfinity;
    const int64_t halo = rows_.back() - rows_.front();
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
    const int64_t outputs = kPixels * kMostVectors * kL;
    const int64_t slot_size = source + row + outputs;
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* v = scratch.get() + slot * slot_size;
      source_.prepare(v + source);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i0 = task % blocks * block_rows_, n = task / blocks;
        const Range i{i0, std::min(i0 + block_rows_, view_.I)};
        transform_source(n, i, v, v + source);
        if (!multiply_block(n, i, v, v + source + row))
          special_[static_cast<size_t>(n)].store(true, std::memory_order_relaxed);
      }
      if (streams_) stream_fence();
    });
    std::vector<int64_t> special;
    for (int64_t n = 0; n < view_.N; ++n)
      if (special_[static_cast<size_t>(n)].load(std::memory_order_relaxed)) special.push_back(n);
    return special;
  }

 private:
  // The vectors of filters from k on that are multiplied together. Halves of lines are not
  // streamed.
  int64_t vectors_from(int64_t k) const {
    const bool halves = view_.dst.c != 1 && pixels_of(kMostVectors) < kL;
    return view_.K - k > kL && !(streams_ && halves) ? kMostVectors : 1;
  }

  void transform_weights(const float* w) {
    std::vector<int64_t> weight(view_.taps.size());  // [row][column], ascending
    for (const ConvTap& tap : view_.taps) {
      const int64_t r = std::lower_bound(rows_.begin(), rows_.end(), tap.h) - rows_.begin();
      weight[static_cast<size_t>(r * columns_ + tap.w - first_column_)] = tap.weight;
    }
    float* u = u_.get();
    for (int64_t k = 0, vectors; k < vectors_ * kL; k += vectors * kL) {
      vectors = vectors_from(k);
      for (const rows::TapGroup& group : groups_)
        for (size_t r = 0; r < rows_.size(); ++r)
          for (int64_t c = 0; c < view_.C; ++c, u += rows::weights_of(group.taps) * vectors * kL)
            for (int64_t f = 0; f < vectors; ++f) {
              Register g[kMostTaps], points[kMostPoints];
              const int64_t filter = k + f * kL, filters = std::min<int64_t>(view_.K - filter, kL);
              for (int s = 0; s < group.taps; ++s) {
                const int64_t tap =
                    static_cast<int64_t>(r) * columns_ + group.column + s * view_.step_w;
                const float* from = w + weight[static_cast<size_t>(tap)] + c * view_.weight_c;
                float lanes[kL] = {};
                for (int64_t l = 0; l < filters; ++l)
                  lanes[l] = from[(filter + l) * view_.weight_k];
                g[s] = V::load(lanes);
              }
              if (group.taps == 3) rows::transform_weight<3>(g, points);
              if (group.taps == 2) rows::transform_weight<2>(g, points);
              if (group.taps == 1) rows::transform_weight<1>(g, points);
              for (int p = 0; p < rows::weights_of(group.taps); ++p)
                V::store(u + (p * vectors + f) * kL, points[p]);
            }
    }
  }

  void transform_source(int64_t n, Range i, float* v, float* scratch) const {
    const int64_t count = (i.size() - 1) * view_.step_h + rows_.back() - rows_.front() + 1;
    for (int64_t y = 0; y < count; ++y, v += source_row_) {
      const int64_t h = i.begin * view_.step_h + rows_.front() + y;
      if (h < 0 || h >= view_.H)
        std::fill_n(v, source_row_, 0.0f);
      else
        source_.transform(src_ + n * view_.src.n + h * view_.src.row, scratch, v);
    }
  }

  // False where a sum is not finite.
  bool multiply_block(int64_t n, Range i, const float* v, float* outputs) const {
    const bool transposed = view_.dst.c != 1;
    auto special = Register{};
    RowTile tile{};
    tile.plane = plane_;
    tile.offsets = offsets_.data();
    std::copy_n(terms_, kMostTaps, tile.terms);
    tile.clamp = clamp_;
    tile.stream = streams_;
    tile.high = high_;
    tile.dst_c = direct_ ? view_.dst.c : transposed ? kPixels : 1;
    tile.dst_column = direct_ ? view_.dst.column : transposed ? 1 : kMostVectors * kL;
    const auto add_tile = [&](int64_t y, int64_t j, int64_t k, int64_t vectors) {
      const bool pair = vectors == kMostVectors;
      const auto kernel = transposed ? (pair ? multiply<true, kMostVectors> : multiply<true, 1>)
                                     : (pair ? multiply<false, kMostVectors> : multiply<false, 1>);
      const int64_t dst = view_.dst_offset + n * view_.dst.n + (i.begin + y) * view_.dst.row +
                          j * view_.dst.column + k * view_.dst.c;
      tile.v = v + y * view_.step_h * source_row_ + j / kOutputs;
      tile.pixels = std::min<int64_t>(view_.J - j, pixels_of(static_cast<int>(vectors)));
      tile.u = u_.get() + k * weights_;
      tile.bias = bias_.get() + k * points_of(1);
      tile.filters = std::min<int64_t>(view_.K - k, vectors * kL);
      tile.dst = direct_ ? epilogue_.y + dst : outputs;
      special += kernel(tile);
      if (!direct_) store(tile, dst);
    };
    // Destinations almost in the order of memory.
    const int64_t rows = transposed ? i.size() : 1;
    for (int64_t first = 0; first < i.size(); first += rows)
      for (int64_t k = 0, vectors; k < view_.K; k += vectors * kL) {
        vectors = vectors_from(k);
        for (int64_t y = first; y < first + rows; ++y)
          for (int64_t j = 0; j < view_.J; j += pixels_of(static_cast<int>(vectors)))
            add_tile(y, j, k, vectors);
      }
    return !has_nan(special);
  }

  // A tile from scratch.
  void store(const RowTile& tile, int64_t dst) const {
    if (tile.dst_column == 1) {
      for (int64_t f = 0; f < tile.filters; ++f)
        epilogue_.store(tile.dst + f * kPixels, tile.pixels, dst + f * view_.dst.c, 1);
    } else {
      for (int64_t p = 0; p < tile.pixels; ++p)
        epilogue_.store(tile.dst + p * tile.dst_column, tile.filters, dst + p * view_.dst.column,
                        1);
    }
  }

  const ConvView& view_;
  const float* src_;
  const Epilogue<float>& epilogue_;
  std::vector<int64_t> rows_;  // distinct offsets of the taps
  int64_t first_column_, columns_;
  std::vector<rows::TapGroup> groups_;
  int64_t tiles_, plane_;
  rows::Source source_;
  int64_t source_row_;
  int64_t vectors_;
  int64_t weights_;                               // vectors of them for a vector of filters
  Buffer<float> u_;                               // [vectors][group, row, channel][point][filter]
  Buffer<float> bias_;                            // [filter]
  std::unique_ptr<std::atomic<bool>[]> special_;  // of each sample
  int64_t terms_[kMostTaps] = {};                 // of three taps, two and one
  std::vector<int64_t> offsets_;   // [group, row, channel], in the transformed source
  bool direct_, clamp_, streams_;  // the kernel applies the epilogue
  float high_;
  int64_t block_rows_, source_rows_;
};

}  // namespace

bool winograd_rows_applies(const ConvView& view) {
  if (view.groups != 1 || view.step_w > kMostStep || view.taps.empty()) return false;
  if (view.dst.c != 1 && view.dst.column != 1) return false;
  const std::vector<int64_t> rows = distinct_offsets(view, &ConvTap::h);
  const std::vector<int64_t> columns = distinct_offsets(view, &ConvTap::w);
  const auto count = static_cast<int64_t>(columns.size());
  return count == columns_of(view) && count <= kMostColumns &&
         view.taps.size() == rows.size() * columns.size() &&
         rows.back() - rows.front() <= kMostHalo && view.step_h <= kMostHalo &&
         4 * rows::planes_of(rows::tap_groups(count, view.step_w)) <= 3 * kOutputs * count;
}

double winograd_rows_products(const ConvView& view) {
  const int64_t columns = columns_of(view);
  return static_cast<double>(rows::planes_of(rows::tap_groups(columns, view.step_w))) /
         static_cast<double>(kOutputs * columns);
}

std::vector<int64_t> winograd_rows(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool) {
  return WinogradRows(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
