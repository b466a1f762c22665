// Columns in bfloat16 would be rounded once for each tap, and in float those of all channels are
// twice the bytes of a float image for each tap. So the columns are made of one channel,
//
//   [tap][pixel of the images],
//
// and folded while they lie in the second-level cache. The terms are pairs of filters: of the
// weights a row for each tap, of dz panels of pixels that all channels share. In channels_last the
// planes of an image that this makes wait for their pixels to be put together.
#include "cpu/column_pairs.h"

#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "cpu/channel_pairs.h"
#include "cpu/channels_last_copy.h"
#include "cpu/col2im.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/gemm_pairs.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Columns of a channel and panels of dz, each.
constexpr int64_t kColumnPairsBytes = 256 << 10;

// panels[pixel / kPanel][pair][pixel % kPanel] of the pixels of `images` images in channels_last.
void fill_panels_of_pixels(const ConvProblem& p, const BFloat16* dz, int64_t images, int64_t panels,
                           float* to, const Parallel& pool) {
  constexpr int64_t kWidth = kPanel<float>;
  const int64_t pixels = images * p.P * p.Q, pairs = ceil_div(p.K, int64_t{2});
  const WorkSplit split(panels, static_cast<double>(8 * kWidth * pairs));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    const Buffer<float> rows(kWidth * pairs);
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kWidth, count = std::min(kWidth, pixels - first);
      copy_pairs(dz + first * p.K, p.K, count, p.K, rows.get(), pairs);
      fill_zero(rows.get() + count * pairs, (kWidth - count) * pairs);
      pack_transposed(rows.get(), pairs, kWidth, pairs, to + first * pairs, kWidth);
    }
  });
}

// The same in NCHW.
void fill_panels(const ConvProblem& p, const BFloat16* dz, int64_t images, int64_t panels,
                 float* to, const Parallel& pool) {
  constexpr int64_t kL = kLanes<float>;
  const int64_t plane = p.P * p.Q, pairs = ceil_div(p.K, int64_t{2});
  const int64_t pixels = images * plane;
  const WorkSplit split(pairs, static_cast<double>(16 * pixels));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const auto at = [&](int64_t pixel) {
        return to + (pixel / kPanel<float> * pairs + pair) * kPanel<float> + pixel % kPanel<float>;
      };
      for (int64_t n = 0; n < images; ++n) {
        const BFloat16* const even = dz + (n * p.K + 2 * pair) * plane;
        const bool odd = 2 * pair + 1 < p.K;
        for (int64_t i = 0; i < plane;) {
          const int64_t pixel = n * plane + i, count = std::min(kL - pixel % kL, plane - i);
          const Vec<uint32_t>::Type both =
              zip_pairs(even + i, count, odd ? even + plane + i : even, odd ? count : 0);
          Vec<uint32_t>::store_partial(reinterpret_cast<uint32_t*>(at(pixel)), both, count);
          i += count;
        }
      }
      for (int64_t pixel = pixels; pixel < panels * kPanel<float>; ++pixel) *at(pixel) = 0;
    }
  });
}

// dx[pixel][c] = planes[c][pixel] of `images` images, but for pixels that no plane has.
void join_planes(const ConvProblem& p, const ConvView& view, const BFloat16* planes, int64_t images,
                 BFloat16* dx, const Parallel& pool) {
  const int64_t plane = p.H * p.W;
  const WorkSplit split(images * view.I, static_cast<double>(2 * p.C * view.J));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / view.I;
      const int64_t at = view.dst_offset + row % view.I * view.dst.row;
      for (int64_t pixel = at; pixel < at + view.J; ++pixel)
        for (int64_t c = 0; c < p.C; ++c)
          dx[(n * plane + pixel) * p.C + c] = planes[(n * p.C + c) * plane + pixel];
    }
  });
}

}  // namespace

void dgrad_column_pairs(const ConvProblem& p, const BFloat16* dz, const BFloat16* w, BFloat16* dx,
                        const Parallel& pool) {
  const bool nchw = p.layout == Layout::kNCHW;
  bool covers_all;
  const ConvView view = dgrad_views(contiguous_problem(p), &covers_all)[0];
  constexpr int64_t kWidth = kPanel<float>, kFloat = sizeof(float);
  const int64_t taps = p.R * p.S, plane = p.P * p.Q, pairs = ceil_div(p.K, int64_t{2});
  const int64_t most = kColumnPairsBytes / (kFloat * plane * std::max(taps, pairs));
  const int64_t parts = ceil_div(p.N, std::clamp<int64_t>(most, 1, p.N));
  const int64_t panels = ceil_div(ceil_div(p.N, parts) * plane, kWidth);
  const Buffer<float> b(panels * pairs * kWidth);
  std::vector<int64_t> offsets(static_cast<size_t>(std::min(pairs, kDepth)));
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int64_t>(i) * kWidth;
  const ColumnFold fold(view);
  const Buffer<BFloat16> planes(nchw ? 0 : ceil_div(p.N, parts) * p.C * p.H * p.W);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = part * p.N / parts, images = (part + 1) * p.N / parts - first;
    const BFloat16* const from = dz + first * p.K * plane;
    BFloat16* const dx_of_part = dx + first * p.C * p.H * p.W;
    BFloat16* const to = nchw ? dx_of_part : planes.get();
    if (nchw)
      fill_panels(p, from, images, panels, b.get(), pool);
    else
      fill_panels_of_pixels(p, from, images, panels, b.get(), pool);
    const WorkSplit split(p.C, static_cast<double>(taps * images * plane * (pairs + 4)));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      const Buffer<float> a(taps * kARow<float>), columns(taps * panels * kWidth);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t k = 0; k < pairs; k += kDepth) {
          const int64_t depth = std::min(kDepth, pairs - k);
          transpose_pairs(w + 2 * k * p.C * taps + (nchw ? c * taps : c), p.C * taps,
                          nchw ? 1 : p.C, taps, std::min(2 * depth, p.K - 2 * k), a.get(),
                          kARow<float>);
          for (int64_t panel = 0; panel < panels; ++panel)
            for_row_tiles(taps, kMaxPairRows, [&](int64_t row, int64_t rows) {
              gemm_pair_microkernel(rows, kMaxVectors)(
                  {a.get() + row * kARow<float>, b.get() + (panel * pairs + k) * kWidth,
                   columns.get() + row * panels * kWidth + panel * kWidth, depth, panels * kWidth,
                   k > 0, offsets.data()});
            });
        }
        for (int64_t n = 0; n < images; ++n)
          fold.plane(columns.get() + n * plane, panels * kWidth, to + (n * p.C + c) * p.H * p.W);
      }
    });
    if (!nchw) join_planes(p, view, planes.get(), images, dx_of_part, pool);
  }
}

}  // namespace torchconv::cpu
