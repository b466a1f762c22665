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
#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {
namespace {

using winograd::kPoints;
using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;
constexpr int kTaps = 3, kOutputs = winograd::tile_outputs(kTaps);

// Tiles whose products are in registers, and their pixels: a whole number of vectors.
constexpr int kTiles = kVectorBytes == 64 ? 4 : 2;
constexpr int kPixels = kTiles * kOutputs;

// Rows that a task reads beyond its own.
constexpr int64_t kMostHalo = 16;
constexpr int64_t kSourceBytes = 256 << 10;
constexpr int64_t kTasksWanted = 12;
// With so few products to an output, stores that first read what they overwrite take longer than
// the products, from fewer bytes on than elsewhere (kStreamedBytes).
constexpr int64_t kStreamed = kStreamedBytes / 2 / static_cast<int64_t>(sizeof(float));

struct RowTile {
  const float* v;  // of the first tile
  int64_t plane;   // from a point to the next
  const int64_t* offsets;
  int64_t terms;
  const float* u;
  const float* bias;
  bool stream;  // past the caches: every vector of dst aligned and whole, but for missing pixels
  bool clamp;   // to [0, high], NaN kept
  float high;
  float* dst;
  int64_t dst_c, dst_column;
  int64_t pixels, filters;  // that exist
};

// Returns a vector with a NaN where a sum is not finite.
template <bool kTransposed>
Register multiply(const RowTile& tile) {
  Register sum[kTiles][kPoints];
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) sum[t][p] = Register{};

  if (!kTransposed && !tile.stream) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) __builtin_prefetch(tile.dst + p * tile.dst_column, 1, 3);
  }
  const float* u = tile.u;
  const int64_t plane = tile.plane;
  for (int64_t k = 0; k < tile.terms; ++k, u += kPoints * kL) {
    const float* const v0 = tile.v + tile.offsets[k];
    const float* const v3 = v0 + 3 * plane;
#pragma GCC unroll 6
    for (int p = 0; p < kPoints; ++p) {
      const float* v = p < 3 ? v0 + p * plane : v3 + (p - 3) * plane;
      const Register filters = V::load(u + p * kL);
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) sum[t][p] += V::broadcast(v[t]) * filters;
    }
  }

  auto special = Register{};
  Register y[kPixels];
  const Register bias = V::load(tile.bias);
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    Register outputs[kOutputs];
    winograd::transform_output<true>(sum[t], outputs);
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) {
      special += outputs[i] - outputs[i];
      y[t * kOutputs + i] = outputs[i] + bias;
    }
  }
  if (tile.clamp) {
    const Register low{}, high = V::broadcast(tile.high);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      y[p] = y[p] < low ? low : y[p];
      y[p] = y[p] > high ? high : y[p];
    }
  }
  if constexpr (kTransposed) {
#pragma GCC unroll 4
    for (int first = 0; first < kPixels; first += kL) {
      Register square[kL];
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) square[i] = y[first + i];
      transpose_steps<1>(square);
      const int64_t pixels = std::min<int64_t>(tile.pixels - first, kL);
      if (pixels <= 0) break;
      float* dst = tile.dst + first;
      if (pixels == kL && tile.filters == kL) {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          WideVec<float>::store(dst + i * tile.dst_c, square[i], tile.stream);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i)
          if (i < tile.filters) V::store_partial(dst + i * tile.dst_c, square[i], pixels);
      }
    }
  } else if (tile.pixels == kPixels && tile.filters == kL) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
      WideVec<float>::store(tile.dst + p * tile.dst_column, y[p], tile.stream);
  } else {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
      if (p < tile.pixels) V::store_partial(tile.dst + p * tile.dst_column, y[p], tile.filters);
  }
  return special;
}

bool has_nan(Register special) {
  float lanes[kL];
  V::store(lanes, special);
  return std::any_of(lanes, lanes + kL, [](float lane) { return lane != lane; });
}

class WinogradRows {
 public:
  WinogradRows(const ConvView& view, const float* src, const float* w, const float* bias,
               const Epilogue<float>& epilogue)
      : view_(view),
        src_(src),
        epilogue_(epilogue),
        rows_(distinct_offsets(view, &ConvTap::h)),
        first_column_(distinct_offsets(view, &ConvTap::w)[0]),
        tiles_(round_up(ceil_div(view.J, kOutputs), kTiles)),
        plane_(round_up(tiles_, kL)),
        source_row_(view.C * kPoints * plane_),
        vectors_(ceil_div(view.K, kL)),
        terms_(static_cast<int64_t>(rows_.size()) * view.C),
        u_(vectors_ * terms_ * kPoints * kL),
        bias_(vectors_ * kL),
        special_(new std::atomic<bool>[static_cast<size_t>(view.N)]()) {
    for (int64_t k = 0; k < vectors_ * kL; ++k)
      bias_[k] = bias != nullptr && k < view.K ? bias[k] : 0;
    for (const int64_t h : rows_)
      for (int64_t c = 0; c < view.C; ++c)
        offsets_.push_back((h - rows_[0]) * source_row_ + c * kPoints * plane_);
    transform_weights(w);
    const Activation activation = epilogue.activation;
    direct_ = epilogue.preactivation == nullptr &&
              (activation == Activation::kNone || activation == Activation::kReLU ||
               activation == Activation::kReLU6);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const bool transposed = view.dst.c != 1;
    streams_ = direct_ && (transposed ? view.dst.c : view.dst.column) % kL == 0 &&
               view.dst.row % kL == 0 && WideVec<float>::streamable(epilogue.y + view.dst_offset) &&
               view.N * view.pixels() * view.K >= kStreamed;
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
                                                static_cast<double>(vectors_ * kL * terms_));
    // What a task reads, a row apart by phases, and a tile of outputs.
    const int64_t source = round_up(source_rows_ * source_row_, 16);
    const int64_t phases = kOutputs * (plane_ + kL), outputs = kPixels * kL;
    const int64_t slot_size = source + phases + outputs;
    Buffer<float> scratch(split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* v = scratch.get() + slot * slot_size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i0 = task % blocks * block_rows_, n = task / blocks;
        const Range i{i0, std::min(i0 + block_rows_, view_.I)};
        transform_source(n, i, v, v + source);
        if (!multiply_block(n, i, v, v + source + phases))
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
  void transform_weights(const float* w) {
    const auto taps = static_cast<int64_t>(view_.taps.size());
    std::vector<int64_t> weight(view_.taps.size());  // [row][column], ascending
    for (const ConvTap& tap : view_.taps) {
      const int64_t r = std::lower_bound(rows_.begin(), rows_.end(), tap.h) - rows_.begin();
      weight[static_cast<size_t>(r * kTaps + tap.w - first_column_)] = tap.weight;
    }
    for (int64_t k = 0; k < vectors_ * kL; k += kL)
      for (int64_t r = 0; r < taps / kTaps; ++r)
        for (int64_t c = 0; c < view_.C; ++c) {
          Register g[kTaps], u[kPoints];
          for (int s = 0; s < kTaps; ++s) {
            const float* from = w + weight[static_cast<size_t>(r * kTaps + s)] + c * view_.weight_c;
            float lanes[kL] = {};
            for (int64_t l = 0; l < std::min<int64_t>(view_.K - k, kL); ++l)
              lanes[l] = from[(k + l) * view_.weight_k];
            g[s] = V::load(lanes);
          }
          winograd::transform_weight(g, u);
          for (int p = 0; p < kPoints; ++p)
            V::store(u_.get() + ((k / kL * terms_ + r * view_.C + c) * kPoints + p) * kL, u[p]);
        }
  }

  // Tile t reads columns first_column_ + 4t + [0, 6) of a row, which lie in phases of 4.
  void transform_source(int64_t n, Range i, float* v, float* phases) const {
    const int64_t count = (i.size() - 1) * view_.step_h + rows_.back() - rows_.front() + 1;
    const int64_t stride = plane_ + kL;
    Range inside[kOutputs];
    for (int p = 0; p < kOutputs; ++p)
      inside[p] = valid_range(tiles_ + 1, kOutputs, first_column_ + p, view_.W);
    for (int64_t y = 0; y < count; ++y) {
      const int64_t h = i.begin * view_.step_h + rows_.front() + y;
      float* to = v + y * source_row_;
      if (h < 0 || h >= view_.H) {
        std::fill_n(to, source_row_, 0.0f);
        continue;
      }
      const float* row = src_ + n * view_.src.n + h * view_.src.row;
      for (int64_t c = 0; c < view_.C; ++c) {
        for (int p = 0; p < kOutputs; ++p) {
          float* phase = phases + p * stride;
          const float* from = row + c * view_.src.c + (first_column_ + p) * view_.src.column;
          std::fill_n(phase, inside[p].begin, 0.0f);
          for (int64_t t = inside[p].begin; t < inside[p].end; ++t)
            phase[t] = from[t * kOutputs * view_.src.column];
          std::fill(phase + inside[p].end, phase + stride, 0.0f);
        }
        for (int64_t t = 0; t < plane_; t += kL, to += kL) {
          Register d[kPoints], points[kPoints];
#pragma GCC unroll 6
          for (int p = 0; p < kPoints; ++p)
            d[p] = V::load(phases + p % kOutputs * stride + t + p / kOutputs);
          winograd::transform_input<true>(d, points);
#pragma GCC unroll 6
          for (int p = 0; p < kPoints; ++p) V::store(to + p * plane_, points[p]);
        }
        to += (kPoints - 1) * plane_;
      }
    }
  }

  // False where a sum is not finite.
  bool multiply_block(int64_t n, Range i, const float* v, float* outputs) const {
    const bool transposed = view_.dst.c != 1;
    const auto kernel = transposed ? multiply<true> : multiply<false>;
    auto special = Register{};
    RowTile tile{};
    tile.plane = plane_;
    tile.offsets = offsets_.data();
    tile.terms = terms_;
    tile.clamp = clamp_;
    tile.stream = streams_;
    tile.high = high_;
    tile.dst_c = direct_ ? view_.dst.c : transposed ? kPixels : 1;
    tile.dst_column = direct_ ? view_.dst.column : transposed ? 1 : kL;
    for (int64_t y = 0; y < i.size(); ++y)
      for (int64_t j = 0; j < view_.J; j += kPixels) {
        tile.v = v + y * view_.step_h * source_row_ + j / kOutputs;
        tile.pixels = std::min<int64_t>(view_.J - j, kPixels);
        const int64_t dst = view_.dst_offset + n * view_.dst.n + (i.begin + y) * view_.dst.row +
                            j * view_.dst.column;
        for (int64_t k = 0; k < view_.K; k += kL) {
          tile.u = u_.get() + k * terms_ * kPoints;
          tile.bias = bias_.get() + k;
          tile.filters = std::min<int64_t>(view_.K - k, kL);
          const int64_t to = dst + k * view_.dst.c;
          tile.dst = direct_ ? epilogue_.y + to : outputs;
          special += kernel(tile);
          if (!direct_) store(tile, to);
        }
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
        epilogue_.store(tile.dst + p * kL, tile.filters, dst + p * view_.dst.column, 1);
    }
  }

  const ConvView& view_;
  const float* src_;
  const Epilogue<float>& epilogue_;
  std::vector<int64_t> rows_;  // distinct offsets of the taps
  int64_t first_column_;
  int64_t tiles_, plane_, source_row_;
  int64_t vectors_, terms_;
  Buffer<float> u_;                               // [vector][row, channel][point][filter]
  Buffer<float> bias_;                            // [filter]
  std::unique_ptr<std::atomic<bool>[]> special_;  // of each sample
  std::vector<int64_t> offsets_;                  // [row, channel], in the transformed source
  bool direct_, clamp_, streams_;                 // the kernel applies the epilogue
  float high_;
  int64_t block_rows_, source_rows_;
};

}  // namespace

bool winograd_rows_applies(const ConvView& view) {
  if (view.groups != 1 || view.step_w != 1 || view.taps.empty()) return false;
  if (view.dst.c != 1 && view.dst.column != 1) return false;
  const std::vector<int64_t> rows = distinct_offsets(view, &ConvTap::h);
  const std::vector<int64_t> columns = distinct_offsets(view, &ConvTap::w);
  return columns.size() == kTaps && columns[2] == columns[0] + 2 &&
         view.taps.size() == rows.size() * kTaps && rows.back() - rows.front() <= kMostHalo &&
         view.step_h <= kMostHalo;
}

std::vector<int64_t> winograd_rows(const ConvView& view, const float* src, const float* w,
                                   const float* bias, const Epilogue<float>& epilogue,
                                   const Parallel& pool) {
  return WinogradRows(view, src, w, bias, epilogue).run(pool);
}

}  // namespace torchconv::cpu
