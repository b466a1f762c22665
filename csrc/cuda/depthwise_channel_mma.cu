// Depthwise fprop and dgrad with channels contiguous (NHWC), half types, stride 1, on tensor cores.
//
// A warp has a slab of channels of 16 spans, each of kSpan neighbouring output columns, of one or
// several images, and rolls them down over the rows of its set. Along a row the convolution is a
// product of 16 spans by the columns and channels of their windows, and of these by the columns and
// channels of a span: a banded matrix of weights, zero between different channels, of which a lane
// keeps its part in registers. Most of its elements are zeros, but the product is one instruction
// where multiplications alone take eight, and nothing is widened. Rows of input come through a ring
// in shared memory that is the warp's own, so that no warp waits for another.
//
// Zero times infinity is NaN, also where the zero stands for another channel or column: outputs
// that are NaN are computed once more by themselves, after all others. Bound: the bytes of x and y.
#include <cmath>

#include "cuda/activation.h"
#include "cuda/channel_lines.cuh"
#include "cuda/depthwise_lines.h"
#include "cuda/mma_half_terms.h"
#include "cuda/packed.h"

namespace torchconv::cuda {
namespace {

// kWords: pairs of channels of a lane. A span's columns of outputs lie side by side in the eight
// columns of an mma, and a unit of its window's columns, as many, in eight of its sixteen terms.
template <typename T, typename Tap, int kSpan, int kWords, int kDepth, int kBlocks>
struct ProductTile : LineTile<T, Tap, 16, kSpan, (Tap::window(kSpan) + kSpan - 1) / kSpan * kSpan,
                              8 / kSpan * kWords, kDepth, kBlocks> {
  static constexpr int kVector = 2 * kWords;
  static constexpr int kPairs = 4 / kSpan;  // lanes along the channels
  static constexpr int kUnits = ProductTile::kWindow / kSpan;
  static constexpr int kWordCount = kWords;
};

template <typename S>
__global__ void __launch_bounds__(kLineWarps * 32, S::kBlocks)
    depthwise_channel_mma_kernel(const __grid_constant__ ChannelLines p, const typename S::T* in,
                                 const typename S::T* w, const Epilogue<typename S::T> epilogue) {
  using T = typename S::T;
  using Tap = typename S::Tap;
  constexpr int R = Tap::R, kTaps = R * R, kWords = S::kWordCount, kVector = S::kVector;
  constexpr int kUnits = S::kUnits, kRows = S::kRows, kRowStep = S::kRowStep;
  constexpr int kWindowRows = S::kWindowRows, kDepth = S::kDepth, kLast = kWindowRows - 1;
  const Gather& g = p.g;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t number = blockIdx.x * kLineWarps + threadIdx.x / 32;
  if (number >= p.warps) return;
  const LineWarp<S> warp(p, number);
  const int channel0 = warp.channel0, group0 = warp.group0, groups = warp.groups;
  const int spans = warp.spans, steps = warp.steps;
  LineRing<S> ring(p, warp, in);
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) ring.load();

  // What a lane holds of an mma: row `eighth` (and 8 more) of the factor and the sums, or column
  // `eighth` of the weights; terms and columns of number `quarter`.
  const int eighth = lane / 4, quarter = lane % 4;
  const int lane_pair = quarter % S::kPairs, lane_column = quarter / S::kPairs;
  const int lane_channel = channel0 + lane_pair * kVector;
  uint32_t weight[R][kUnits][kWords];
  {
    const int column = eighth / 2 / S::kPairs, half = eighth % 2;
    const bool same = eighth / 2 % S::kPairs == lane_pair;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int j = u * S::kSpan + lane_column, s = Tap::tap(column, j);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int tap = r * R + s;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const int c = lane_channel + 2 * i + half;
          uint32_t word = 0;
          if (same && Tap::meet(column, j) && c < p.channels)
            word = reinterpret_cast<const uint16_t*>(
                w)[static_cast<int64_t>(c) * kTaps + (g.turned ? kTaps - 1 - tap : tap)];
          weight[r][u][i] = word << (16 * half);
        }
      }
    }
  }
  Packed<T, kVector> first{};
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (lane_channel < p.channels && epilogue.bias != nullptr)
      first.word[i / 2] |=
          static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(epilogue.bias)[lane_channel + i])
          << (i % 2 * 16);

  // Of rows `eighth` and eighth + 8: the window in a row of the ring, and the first output.
  const char* window[2];
  int64_t target[2];
  bool stored[2];
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    const int row = eighth + 8 * a;
    uint32_t n = warp.span0 + static_cast<uint32_t>(row < spans ? row : 0);
    window[a] = ring.rows + (S::begin(p, n) - warp.line0 + lane_column) * S::kPixel +
                lane_pair * 4 * kWords;
    const int column = static_cast<int>(p.spans.split(n)) * S::kSpan + lane_column;
    stored[a] = row < spans && column < g.w.out && lane_channel < p.channels;
    target[a] =
        ((static_cast<int64_t>(n) * g.h.out + group0 * kRows) * g.w.out + column) * p.channels +
        lane_channel;
  }

  const int64_t out_row = static_cast<int64_t>(g.w.out) * p.channels;
  const Activation activation = epilogue.activation;
  const bool relu = activation != Activation::kNone;
  const float most = activation == Activation::kReLU6 ? 6.0f : INFINITY;
  const uint32_t nothing = static_cast<uint32_t>(p.row_bytes) >> 31;
  float z[S::kSlots][kRows][kWords][4] = {};
  float finite = 0;  // NaN once a sum is NaN or infinite
  int from = 0;
#pragma unroll 1
  for (int base = 0; base < steps; base += S::kUnroll) {
#pragma unroll
    for (int u = 0; u < S::kUnroll; ++u) {
      const int step = base + u;
      if (step >= steps) break;
      copy_async_wait<kDepth - 2>();
      __syncwarp();
      ring.load();
      if (u % kRowStep == 0) {
#pragma unroll
        for (int i = 0; i < kRows * kWords * 4; ++i)
          z[u / kRowStep][i / 4 / kWords][i / 4 % kWords][i % 4] =
              first.wide(i / 4 % kWords * 2 + i % 2);
      }
      if (static_cast<unsigned>(warp.h0 + step) < static_cast<unsigned>(g.h.in)) {
#pragma unroll
        for (int unit = 0; unit < kUnits; unit += 2) {
          // In the order of an mma's words, which loaded vectors are not in. Without the operation
          // that changes nothing ptxas would move them anew for every mma.
          uint32_t factor[kWords][4] = {};
#pragma unroll
          for (int k = 0; k < 2 && unit + k < kUnits; ++k)
#pragma unroll
            for (int a = 0; a < 2; ++a) {
              const auto x = *reinterpret_cast<const Vector<uint32_t, kWords>*>(
                  window[a] + from + (unit + k) * S::kSpan * S::kPixel);
#pragma unroll
              for (int i = 0; i < kWords; ++i) factor[i][2 * k + a] = x.element[i] | nothing;
            }
#pragma unroll
          for (int j = 0; j < kWindowRows; ++j) {
            if ((u - j + S::kUnroll) % kRowStep != 0) continue;
            if (R > 3 && (step < j || step - j >= groups * kRowStep)) continue;
            const int slot = (u - j + 2 * S::kUnroll) / kRowStep % S::kSlots;
#pragma unroll
            for (int row = 0; row < kRows; ++row) {
              if (!Tap::meet(row, j)) continue;
              const int r = Tap::tap(row, j);
#pragma unroll
              for (int i = 0; i < kWords; ++i) {
                if (unit + 1 < kUnits)
                  mma<T>(z[slot][row][i], factor[i], weight[r][unit][i],
                         weight[r][min(unit + 1, kUnits - 1)][i]);
                else
                  mma<T>(z[slot][row][i], {factor[i][0], factor[i][1]}, weight[r][unit][i]);
              }
            }
          }
        }
      }
      from += p.row_bytes;
      if (from == kDepth * p.row_bytes) from = 0;

      if ((u - kLast + S::kUnroll) % kRowStep != 0 || step < kLast) continue;
      const int slot = (u - kLast + 2 * S::kUnroll) / kRowStep % S::kSlots;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kWords * 4; ++i) sum += z[slot][row][i / 4][i % 4];
        finite = fmaf(sum, 0.0f, finite);
        const bool there =
            kRows == 1 || (group0 + (step - kLast) / kRowStep) * kRows + row < g.h.out;
        const auto store = [&](auto activated) {
#pragma unroll
          for (int a = 0; a < 2; ++a) {
            Vector<T, kVector> rounded;
#pragma unroll
            for (int i = 0; i < kVector; ++i)
              rounded.element[i] = from_wide<T>(activated(z[slot][row][i / 2][2 * a + i % 2]));
            if (stored[a] && there)
              *reinterpret_cast<Vector<T, kVector>*>(epilogue.y + target[a]) = rounded;
            target[a] += out_row;
          }
        };
        if (relu)
          store([&](float y) {
            y = y < 0.0f ? 0.0f : y;
            return y > most ? most : y;
          });
        else
          store([](float y) { return y; });
      }
    }
  }

  if (finite == finite) return;
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    if (!stored[a]) continue;
    uint32_t n = warp.span0 + static_cast<uint32_t>(eighth + 8 * a);
    const int column0 = static_cast<int>(p.spans.split(n)) * S::kStep + g.w.origin;
    const T* image = in + n * ring.in_row * g.h.in + lane_channel;
#pragma unroll 1
    for (int row = group0 * kRows; row < min((group0 + groups) * kRows, g.h.out); ++row) {
      T* y =
          epilogue.y + target[a] - (static_cast<int64_t>(groups + group0) * kRows - row) * out_row;
#pragma unroll 1
      for (int v = 0; v < kVector; ++v) {
        if (to_wide(y[v]) == to_wide(y[v])) continue;
        float sum = epilogue.bias_of(lane_channel + v);
#pragma unroll 1
        for (int j = 0; j < kWindowRows; ++j) {
          const int h = row / kRows * kRowStep + g.h.origin + j;
          if (!Tap::meet(row % kRows, j) || h < 0 || h >= g.h.in) continue;
#pragma unroll 1
          for (int i = 0; i < Tap::window(S::kSpan); ++i) {
            const int column = column0 + i;
            if (!Tap::meet(lane_column, i) || column < 0 || column >= g.w.in) continue;
            const int tap = Tap::tap(row % kRows, j) * R + Tap::tap(lane_column, i);
            sum += to_wide(w[static_cast<int64_t>(lane_channel + v) * kTaps +
                             (g.turned ? kTaps - 1 - tap : tap)]) *
                   to_wide(image[h * ring.in_row + static_cast<int64_t>(column) * p.channels + v]);
          }
        }
        if (relu) sum = sum < 0.0f ? 0.0f : sum > most ? most : sum;
        y[v] = from_wide<T>(sum);
      }
    }
  }
}

template <typename S>
bool launch_product(const Gather& g, const void* in, const void* w, const void* bias, void* out,
                    Activation activation, int64_t warps, const Queue& queue) {
  using T = typename S::T;
  // Of a row's products, of which the four processors each take a quarter.
  constexpr int64_t kClocks = S::Tap::R * S::kUnits * S::kWordCount / S::kRowStep * 4 / 5;
  ChannelLines p{};
  if (!channel_lines_take<T>(g, in, out, activation, queue) ||
      !channel_lines<S>(g, kClocks, warps, p))
    return false;
  launch(depthwise_channel_mma_kernel<S>,
         dim3(static_cast<unsigned>(ceil_div(p.warps, kLineWarps))), dim3(kLineWarps * 32),
         kLineWarps * S::kDepth * p.row_bytes, queue, p, static_cast<const T*>(in),
         static_cast<const T*>(w),
         Epilogue<T>{static_cast<const T*>(bias), static_cast<T*>(out), nullptr, activation});
  return true;
}

}  // namespace

bool depthwise_channel_mma(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                           const void* in, const void* w, const void* bias, void* out,
                           Activation activation, const Queue& queue) {
  // A 3x3 kernel over narrow rows has too few products for what a warp does before the first.
  if (sampling != Sampling::kUnit || (R == 3 && g.w.out < 10)) return false;
  const auto compute = [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto tile, int64_t warps) {
      return launch_product<decltype(tile)>(g, in, w, bias, out, activation, warps, queue);
    };
    constexpr int64_t kWarps = 8;
    return R == 7   ? run(ProductTile<T, Taps<7, Sampling::kUnit>, 2, 2, 6, 3>{}, kWarps)
           : R == 5 ? run(ProductTile<T, Taps<5, Sampling::kUnit>, 2, 4, 6, 2>{}, 0)
                    : run(ProductTile<T, Taps<3, Sampling::kUnit>, 1, 2, 6, 4>{}, kWarps);
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
