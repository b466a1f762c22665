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
#include "cuda/packed.h"
#include "cuda/tensor_core_of_8.h"

namespace torchconv::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(kLineWarps * 32, S::kBlocks)
    depthwise_channel_mma_kernel(const __grid_constant__ ChannelLines p, const typename S::T* in,
                                 const typename S::T* w, const Epilogue<typename S::T> epilogue) {
  using T = typename S::T;
  constexpr int R = S::R, kTaps = R * R, kWords = S::kWords, kVector = S::kVector;
  constexpr int kUnits = S::kUnits, kDepth = S::kDepth;
  const Gather& g = p.g;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t number = blockIdx.x * kLineWarps + threadIdx.x / 32;
  if (number >= p.warps) return;
  const LineWarp<S> warp(p, number);
  const int row0 = warp.row0, rows = warp.rows;
  const int spans = warp.spans, steps = warp.steps;
  LineRing<S> ring(p, warp, in);
#pragma unroll
  for (int i = 0; i < kDepth - 1; ++i) ring.load();

  // What a lane holds of an mma: row `eighth` (and 8 more) of the factor and the sums, or column
  // `eighth` of the weights; terms and columns of number `quarter`.
  const int eighth = lane / 4, quarter = lane % 4;
  const int lane_pair = quarter % S::kPairs, lane_column = quarter / S::kPairs;
  const int lane_channel = warp.channel0 + lane_pair * kVector;
  uint32_t weight[R][kUnits][kWords];
  {
    const int column = eighth / 2 / S::kPairs, half = eighth % 2;
    const bool same = eighth / 2 % S::kPairs == lane_pair;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int s = u * S::kSpan + lane_column - column;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int tap = r * R + s;
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const int c = lane_channel + 2 * i + half;
          uint32_t word = 0;
          if (same && s >= 0 && s < R && c < p.channels)
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
        ((static_cast<int64_t>(n) * g.h.out + row0) * g.w.out + column) * p.channels + lane_channel;
  }

  const int64_t out_row = static_cast<int64_t>(g.w.out) * p.channels;
  const Activation activation = epilogue.activation;
  const bool relu = activation != Activation::kNone;
  const float most = activation == Activation::kReLU6 ? 6.0f : INFINITY;
  const uint32_t nothing = static_cast<uint32_t>(p.row_bytes) >> 31;
  float z[R][kWords][4] = {};  // of rows of outputs
  float finite = 0;            // NaN once a sum is NaN or infinite
  int from = 0;
#pragma unroll 1
  for (int base = 0; base < steps; base += R) {
#pragma unroll
    for (int u = 0; u < R; ++u) {
      const int step = base + u;
      if (step >= steps) break;
      copy_async_wait<kDepth - 2>();
      __syncwarp();
      ring.load();
#pragma unroll
      for (int i = 0; i < kWords * 4; ++i) z[u][i / 4][i % 4] = first.wide(i / 4 * 2 + i % 2);
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
          for (int r = 0; r < R; ++r) {
            if (R > 3 && (step < r || step - r >= rows)) continue;
            const int slot = (u - r + R) % R;
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              if (unit + 1 < kUnits)
                mma<T>(z[slot][i], factor[i], weight[r][unit][i],
                       weight[r][min(unit + 1, kUnits - 1)][i]);
              else
                mma_of_8<T>(z[slot][i], factor[i][0], factor[i][1], weight[r][unit][i]);
            }
          }
        }
      }
      from += p.row_bytes;
      if (from == kDepth * p.row_bytes) from = 0;

      if (step < R - 1) continue;
      const auto& whole = z[(u + 1) % R];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kWords * 4; ++i) sum += whole[i / 4][i % 4];
      finite = fmaf(sum, 0.0f, finite);
      const auto store = [&](auto activated) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
          Vector<T, kVector> rounded;
#pragma unroll
          for (int i = 0; i < kVector; ++i)
            rounded.element[i] = from_wide<T>(activated(whole[i / 2][2 * a + i % 2]));
          if (stored[a]) *reinterpret_cast<Vector<T, kVector>*>(epilogue.y + target[a]) = rounded;
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

  if (finite == finite) return;
#pragma unroll
  for (int a = 0; a < 2; ++a) {
    if (!stored[a]) continue;
    uint32_t n = warp.span0 + static_cast<uint32_t>(eighth + 8 * a);
    const int column0 = static_cast<int>(p.spans.split(n)) * S::kSpan + lane_column + g.w.origin;
    const T* image = in + n * ring.in_row * g.h.in + lane_channel;
#pragma unroll 1
    for (int row = row0; row < row0 + rows; ++row) {
      T* y = epilogue.y + target[a] - (static_cast<int64_t>(row0) + rows - row) * out_row;
#pragma unroll 1
      for (int v = 0; v < kVector; ++v) {
        if (to_wide(y[v]) == to_wide(y[v])) continue;
        float sum = epilogue.bias_of(lane_channel + v);
#pragma unroll 1
        for (int tap = 0; tap < kTaps; ++tap) {
          const int h = row + g.h.origin + tap / R, column = column0 + tap % R;
          if (h < 0 || h >= g.h.in || column < 0 || column >= g.w.in) continue;
          sum += to_wide(w[static_cast<int64_t>(lane_channel + v) * kTaps +
                           (g.turned ? kTaps - 1 - tap : tap)]) *
                 to_wide(image[h * ring.in_row + static_cast<int64_t>(column) * p.channels + v]);
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
  ChannelLines p{};
  if (!channel_lines_take<T>(g, in, out, activation, queue) || !channel_lines<S>(g, warps, p))
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
    return R == 7   ? run(LineTile<T, 7, 2, 2, 3>{}, kWarps)
           : R == 5 ? run(LineTile<T, 5, 2, 4, 2>{}, 0)
                    : run(LineTile<T, 3, 1, 2, 4>{}, kWarps);
  };
  return dtype == DType::kFloat16    ? compute(Half{})
         : dtype == DType::kBFloat16 ? compute(BFloat16{})
                                     : false;
}

}  // namespace torchconv::cuda
