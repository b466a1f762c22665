// Where channels are neighbours in memory so are the two columns of a unit, and a row of it is one
// short copy. Where pixels are, rows are split into their even and odd columns on the way to or
// from a transposition.
#include "cpu/winograd_strided_fold.h"

#include "cpu/transpose_tile.h"
#include "cpu/winograd_weights.h"

namespace torchconv::cpu::winograd_strided {
namespace {

using V = Vec<float>;
using Register = V::Type;

constexpr int kFoldedTaps = quad::kTaps * quad::kTaps;

// The weight of a folded channel and its counterpart at each place of the window.
struct FoldedWeight {
  const Plan::Fold& fold;
  const float* w;
  float operator()(int64_t folded, int64_t other, int tap) const {
    const int64_t phase = folded / fold.channels, c = folded % fold.channels;
    const int64_t row = fold.row_taps[phase / 2][tap / quad::kTaps];
    const int64_t column = fold.column_taps[phase % 2][tap % quad::kTaps];
    return row < 0 || column < 0
               ? 0.0f
               : w[c * fold.weight_channel + other * fold.weight_other + row + column];
  }
};

}  // namespace

void transform_folded_weights(const Plan& plan, const float* w, int64_t panel, int64_t block,
                              float* u) {
  const WeightLayout layout(plan);
  const ConvView& view = plan.view;
  const FoldedWeight weight{plan.fold, w};
  const bool fprop = plan.rows.form == Axis::kFold;
  const int64_t first = panel * kFilters, filters = std::min(view.K - first, kFilters);
  alignas(64) float g[kFoldedTaps * kFilters];
  for (int64_t i = 0; i < plan.vectors_in(block) * kVector; ++i) {
    const int64_t c = block * plan.block_vectors * kVector + i;
    for (int tap = 0; tap < kFoldedTaps; ++tap)
      for (int64_t k = 0; k < kFilters; ++k)
        g[tap * kFilters + k] = c >= view.C || k >= filters ? 0.0f
                                : fprop                     ? weight(c, first + k, tap)
                                                            : weight(first + k, c, tap);
    for (int64_t k = 0; k < kFilters; k += kVector)
      winograd::transform_filter<float, quad::kTaps>(g + k, u + i * kFilters + k, layout.plane);
  }
}

// ---- Source.

int64_t fold_scratch(const Plan& plan, int64_t width) {
  return plan.vectors * kVector * odd_lines(width + kVector);
}
int64_t folded_band_size(const Plan& plan, int64_t height, int64_t width) {
  return height * width * plan.vectors * kVector + kVector;
}

void fold_source(const Plan& plan, const float* src, int64_t h, int64_t w, int64_t height,
                 int64_t width, float* band, float* scratch) {
  const ConvView& view = plan.view;
  const Plan::Fold& fold = plan.fold;
  const int64_t C = fold.channels, lanes = plan.vectors * kVector;
  // Columns of the image that the window has: elements [begin, end) of its 2*width, the first of
  // which is at `left`.
  const int64_t left = 2 * w - fold.pad_left;
  const int64_t begin = std::min(std::max(-left, int64_t{0}), 2 * width);
  const int64_t end = std::max(begin, std::min(2 * width, fold.W - left));
  const auto row_of = [&](int64_t r, int64_t a) { return 2 * (h + r) + a - fold.pad_top; };
  if (view.src.c == 1) {
    for (int64_t r = 0; r < height; ++r) {
      float* to = band + r * width * lanes;
      for (int64_t p = 0; p < width; ++p, to += lanes) {
        for (int64_t l = 4 * C / kVector * kVector; l < lanes; l += kVector)
          V::store(to + l, Register{});
        for (int64_t a = 0; a < 2; ++a) {
          const int64_t row = row_of(r, a);
          const int64_t first = std::max(begin - 2 * p, int64_t{0});
          const int64_t last = std::min(end - 2 * p, int64_t{2});
          float* half = to + a * 2 * C;
          if (row < 0 || row >= fold.H || first >= last) {
            V::store(half, Register{});
            continue;
          }
          const float* from = src + row * view.src.row + (left + 2 * p + first) * C;
          const Register pixels = V::load_partial(from, (last - first) * C);
          if (first > 0) V::store(half, Register{});
          V::store(half + first * C, pixels);
        }
      }
    }
    return;
  }
  const int64_t plane = odd_lines(width + kVector);
  for (int64_t r = 0; r < height; ++r) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float* to = scratch + lane * plane;
      const int64_t phase = lane / C, b = phase % 2, row = phase < 4 ? row_of(r, phase / 2) : -1;
      if (row < 0 || row >= fold.H) {
        for (int64_t p = 0; p < width; ++p) to[p] = 0.0f;
        continue;
      }
      const int64_t first = (begin - b + 1) / 2, last = std::max(first, (end - b + 1) / 2);
      for (int64_t p = 0; p < first; ++p) to[p] = 0.0f;
      const float* from = src + lane % C * view.src.c + row * view.src.row;
      const int64_t offset = left + b;
      for (int64_t p = first; p < last; ++p) to[p] = from[offset + 2 * p];
      for (int64_t p = last; p < width; ++p) to[p] = 0.0f;
    }
    for (int64_t p = 0; p < width; p += kVector)
      for (int64_t lane = 0; lane < lanes; lane += kVector)
        transpose_tile(scratch + lane * plane + p, plane, kVector, std::min(width - p, kVector),
                       band + (r * width + p) * lanes + lane, lanes, std::min(width - p, kVector));
  }
}

// ---- Destination.

void unfold_band(const Plan& plan, const float* band, int64_t units, int64_t rows, int64_t columns,
                 float* dst, float* scratch) {
  const ConvStrides& image = plan.view.dst;
  const int64_t C = plan.fold.channels;
  if (image.c == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const float* from = band + r / 2 * units * kFilters + r % 2 * 2 * C;
      float* to = dst + r * image.row;
      for (int64_t left = columns * C; left > 0; left -= 2 * C, to += 2 * C, from += kFilters) {
        // What is written beyond the unit is overwritten by the next one.
        if (left >= kVector)
          V::store(to, V::load(from));
        else
          V::store_partial(to, V::load(from), std::min(left, 2 * C));
      }
    }
    return;
  }
  const int64_t plane = odd_lines(units + kVector);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = band + r / 2 * units * kFilters;
    if (r % 2 == 0)
      for (int64_t lane = 0; lane < 4 * C; lane += kVector)
        for (int64_t p = 0; p < units; p += kVector)
          transpose_tile(from + p * kFilters + lane, kFilters, std::min(units - p, kVector),
                         std::min(4 * C - lane, kVector), scratch + lane * plane + p, plane,
                         std::min(4 * C - lane, kVector));
    for (int64_t c = 0; c < C; ++c) {
      const float* even = scratch + (r % 2 * 2 * C + c) * plane;
      const float* odd = even + C * plane;
      float* to = dst + c * image.c + r * image.row;
      for (int64_t p = 0; p < columns / 2; ++p) {
        to[2 * p] = even[p];
        to[2 * p + 1] = odd[p];
      }
      if (columns % 2 != 0) to[columns - 1] = even[columns / 2];
    }
  }
}

}  // namespace torchconv::cpu::winograd_strided
