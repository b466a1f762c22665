// Blocked and space-to-depth copies for the weight gradient in Winograd's domain.
#include "cpu/winograd_wgrad_phases.h"

#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"
#include "cpu/winograd_wgrad_operands.h"

namespace torchconv::cpu::winograd_gradient {
namespace {

constexpr int64_t kPhaseTaps = 4;

}  // namespace

template <typename A>
BlockedImage<A> block_channels(const A* src, const ConvStrides& stride, int64_t N, int64_t C,
                               int64_t rows, int64_t columns, const Parallel& pool) {
  constexpr int64_t kL = kLanes<A>;
  const int64_t image = round_up(rows * columns, kL) * kL, vectors = ceil_div(C, kL);
  BlockedImage<A> blocked{image, N * image, Buffer<A>(vectors * N * image)};
  const WorkSplit split(vectors * N, static_cast<double>(image));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t v = item / N, n = item % N;
      transpose_pixels(src + n * stride.n + v * kL * stride.c, stride.c, std::min(kL, C - v * kL),
                       rows * columns, 0, blocked.data.get() + item * image);
    }
  });
  return blocked;
}

template <typename A>
BlockedImage<A> space_to_depth(const ConvView& view, const A* x, int64_t rows, int64_t columns,
                               const Parallel& pool) {
  constexpr int64_t kL = kLanes<A>;
  const int64_t vectors = ceil_div(4 * view.C, kL), row = columns * kL, image = rows * row;
  BlockedImage<A> blocked{image, view.N * image, Buffer<A>(vectors * view.N * image)};
  const int64_t top = view.taps[0].h, left = view.taps[0].w;
  const WorkSplit split(view.N * rows, static_cast<double>(4 * vectors * row));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / rows, i = item % rows;
      A* dst = blocked.data.get() + n * image + i * row;
      for (int64_t v = 0; v < vectors; ++v) fill_zero(dst + v * blocked.vector, row);
      for (int64_t q = 0; q < 4 * view.C; ++q) {
        const int64_t h = top + 2 * i + q / 2 % 2, w = left + q % 2;
        if (h < 0 || h >= view.H) continue;
        const A* src = x + n * view.src.n + q / 4 * view.src.c + h * view.src.row;
        A* lane = dst + q / kL * blocked.vector + q % kL;
        const Range range = valid_range(columns, 2, w, view.W);
        for (int64_t j = range.begin; j < std::min(range.end, columns); ++j)
          lane[j * kL] = src[(2 * j + w) * view.src.column];
      }
    }
  });
  return blocked;
}

#define TORCHCONV_INSTANTIATE(A)                                                                   \
  template BlockedImage<A> block_channels(const A*, const ConvStrides&, int64_t, int64_t, int64_t, \
                                          int64_t, const Parallel&);                               \
  template BlockedImage<A> space_to_depth(const ConvView&, const A*, int64_t, int64_t,             \
                                          const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
#undef TORCHCONV_INSTANTIATE

std::vector<int64_t> phase_tap_offsets(const ConvView& view) {
  std::vector<int64_t> offsets(4 * view.C * kPhaseTaps * kPhaseTaps, -1);
  for (const ConvTap& tap : view.taps) {
    const int64_t h = tap.h - view.taps[0].h, w = tap.w - view.taps[0].w;
    for (int64_t c = 0; c < view.C; ++c) {
      const int64_t channel = c * 4 + h % 2 * 2 + w % 2;
      offsets[(channel * kPhaseTaps + h / 2) * kPhaseTaps + w / 2] = c * view.weight_c + tap.weight;
    }
  }
  return offsets;
}

}  // namespace torchconv::cpu::winograd_gradient
