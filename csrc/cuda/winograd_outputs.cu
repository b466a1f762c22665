// Winograd's transforms of its products: to outputs, with what happens to a finished sum, and to
// the weight's gradient. Bound by memory.
//
// An infinity or a NaN among a tile's inputs spreads to all of its outputs, and an overflow makes
// one: it is found here, as the products of these are never finite again.
#include "core/range.h"
#include "cuda/activate_tile.h"
#include "cuda/winograd_tiles.h"

namespace torchconv::cuda::winograd {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSums = kOutputs * kOutputs;

__device__ __forceinline__ bool finite(float v) { return v - v == 0; }

struct Outputs {
  Panels m;
  Tiles tiles;
  Target target;
  Epilogue<float> epilogue;
  int* flags;
  bool rows_of_quads;  // four columns are neighbours, and aligned
};

// The lanes run along what is innermost in the target, tiles or channels, and the warps along the
// other.
template <bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 4)
    winograd_outputs(const __grid_constant__ Outputs p, unsigned tile_blocks) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(blockIdx.x % tile_blocks) * (kChannelsLast ? kWarps : 32) +
                   (kChannelsLast ? warp : lane);
  const int channel = static_cast<int>(blockIdx.x / tile_blocks) * (kChannelsLast ? 32 : kWarps) +
                      (kChannelsLast ? lane : warp);
  if (tile >= p.tiles.ranges.count || channel >= p.target.channels) return;
  const float* from = p.m.data + channel * p.m.channel + tile * p.m.tile;
  float products[kPoints][kPoints];
#pragma unroll
  for (int r = 0; r < kPoints; ++r)
#pragma unroll
    for (int s = 0; s < kPoints; ++s) products[r][s] = from[(r * kPoints + s) * p.m.point];
  float rows[kPoints][kOutputs];
#pragma unroll
  for (int r = 0; r < kPoints; ++r) transform_products(products[r], rows[r]);
  const Place place = p.tiles.place(tile);
  const int rows_left = min(place.rows, p.target.rows - place.i);
  const int columns_left = min(place.columns, p.target.columns - place.j);
  float z[kSums];
  bool all_finite = true;
#pragma unroll
  for (int j = 0; j < kOutputs; ++j) {
    const float column[kPoints] = {rows[0][j], rows[1][j], rows[2][j],
                                   rows[3][j], rows[4][j], rows[5][j]};
    float sums[kOutputs];
    transform_products(column, sums);
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      all_finite = all_finite && (finite(sums[i]) || i >= rows_left || j >= columns_left);
      z[i * kOutputs + j] = sums[i];
    }
  }

  if (!all_finite) p.flags[place.n] = 1;
  const Epilogue<float>& e = p.epilogue;
  const SimtStrides& t = p.target.strides;
  const float bias = e.bias_of(channel);
  const int64_t first = place.n * t.n + channel * t.c + place.i * t.row + place.j * t.column;
  // f(element of z, offset) for what lies in the target; with quads for four neighbours at once.
  const auto each = [&](auto&& one, auto&& four) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (i >= rows_left) break;
      if (!kChannelsLast && p.rows_of_quads) {
        four(i * kOutputs, first + i * t.row);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kOutputs; ++j)
        if (j < columns_left) one(i * kOutputs + j, first + i * t.row + j * t.column);
    }
  };
  using Quad = Vector<float, kOutputs>;
  const auto write = [&](float* to) {
    each([&](int at, int64_t offset) { to[offset] = z[at]; },
         [&](int at, int64_t offset) {
           *reinterpret_cast<Quad*>(to + offset) = {{z[at], z[at + 1], z[at + 2], z[at + 3]}};
         });
  };
#pragma unroll
  for (int i = 0; i < kSums; ++i) z[i] += bias;
  if (e.residual != nullptr)
    each([&](int at, int64_t offset) { z[at] += e.residual[offset]; },
         [&](int at, int64_t offset) {
           const Quad residual = *reinterpret_cast<const Quad*>(e.residual + offset);
#pragma unroll
           for (int q = 0; q < kOutputs; ++q) z[at + q] += residual.element[q];
         });
  if (e.preactivation != nullptr) write(e.preactivation);
  activate_tile<kOutputs>(e.activation, z);
  write(e.y);
}

// A block of 32 channels of one filter, whose eight warps share the slices.
__global__ void __launch_bounds__(kThreads)
    winograd_weight_gradients(const __grid_constant__ WeightGradient p, unsigned channel_blocks,
                              int* flag) {
  __shared__ float parts[kWarps][kProducts][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int k = static_cast<int>(blockIdx.x / channel_blocks);
  const int c = static_cast<int>(blockIdx.x % channel_blocks) * 32 + lane;
  const bool active = c < p.C;
  const int parts_used = min(p.slices, kWarps);
  if (active && warp < parts_used) {
    float sums[kProducts];
    const float* from = p.sums + warp * p.slice + k * p.width + c;
#pragma unroll
    for (int point = 0; point < kProducts; ++point) sums[point] = from[point * p.point];
#pragma unroll 1
    for (int slice = warp + kWarps; slice < p.slices; slice += kWarps) {
      from += kWarps * p.slice;
#pragma unroll
      for (int point = 0; point < kProducts; ++point) sums[point] += from[point * p.point];
    }
#pragma unroll
    for (int point = 0; point < kProducts; ++point) parts[warp][point][lane] = sums[point];
  }
  __syncthreads();
  if (active) {
    for (int point = warp; point < kProducts; point += kWarps) {
      float sum = parts[0][point][lane];
      for (int part = 1; part < parts_used; ++part) sum += parts[part][point][lane];
      parts[0][point][lane] = sum;
    }
  }
  __syncthreads();
  if (!active || warp > 0) return;
  float rows[kPoints][kTaps];
#pragma unroll
  for (int r = 0; r < kPoints; ++r) {
    float products[kPoints];
#pragma unroll
    for (int s = 0; s < kPoints; ++s) products[s] = parts[0][r * kPoints + s][lane];
    transform_weight_products(products, rows[r]);
  }
  float* to = p.dw + k * p.strides.k + c * p.strides.c;
  bool all_finite = true;
#pragma unroll
  for (int s = 0; s < kTaps; ++s) {
    const float column[kPoints] = {rows[0][s], rows[1][s], rows[2][s],
                                   rows[3][s], rows[4][s], rows[5][s]};
    float taps[kTaps];
    transform_weight_products(column, taps);
#pragma unroll
    for (int r = 0; r < kTaps; ++r) {
      all_finite = all_finite && finite(taps[r]);
      const int row = p.flip ? kTaps - 1 - r : r, at = p.flip ? kTaps - 1 - s : s;
      to[row * p.strides.r + at * p.strides.s] = taps[r];
    }
  }
  if (!all_finite) *flag = 1;
}

}  // namespace

void transform_outputs(const Panels& m, const Tiles& tiles, const Target& target,
                       const Epilogue<float>& epilogue, int* flags, const Queue& queue) {
  const bool channels_last = target.strides.c == 1;
  const bool quads = !channels_last && target.columns % kOutputs == 0 &&
                     aligned<float>(epilogue.y, kOutputs) &&
                     aligned<float>(epilogue.preactivation, kOutputs) &&
                     aligned<float>(epilogue.residual, kOutputs);
  const Outputs p{m, tiles, target, epilogue, flags, quads};
  const int64_t tile_blocks = ceil_div(tiles.ranges.count, channels_last ? kWarps : 32);
  const int64_t channel_blocks = ceil_div(target.channels, channels_last ? 32 : kWarps);
  launch(channels_last ? winograd_outputs<true> : winograd_outputs<false>,
         dim3(static_cast<unsigned>(tile_blocks * channel_blocks)), kThreads, 0, queue, p,
         static_cast<unsigned>(tile_blocks));
}

void transform_weight_gradients(const WeightGradient& p, int* flag, const Queue& queue) {
  const int64_t channel_blocks = ceil_div(p.C, 32);
  launch(winograd_weight_gradients, dim3(static_cast<unsigned>(p.K * channel_blocks)), kThreads, 0,
         queue, p, static_cast<unsigned>(channel_blocks), flag);
}

}  // namespace torchconv::cuda::winograd
