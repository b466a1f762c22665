// Depthwise wgrad of any kernel, stride, dilation and layout: a block sums one tap, of one filter
// whose pixels are contiguous (NCHW), or of as many filters as it has lanes (NHWC). Slices of all
// pixels are cut by the shape alone and added by block_sums.cu.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 256;

struct TapWgrad {
  int H, W, C, K, R, S, multiplier;
  int stride_h, stride_w, dilation_h, dilation_w, pad_top, pad_left;
  int64_t x_pixel, x_channel, z_pixel, z_channel;  // distances
  bool flip;
  Divisor lanes, tiles, taps, columns, rows;
  int subs;                            // threads of a filter
  int64_t positions, slice_positions;  // pixels of z, of all images
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    depthwise_taps_wgrad_kernel(const __grid_constant__ TapWgrad p, const T* dz, const T* x,
                                const SliceSums<T> sums) {
  using A = Wide<T>;
  __shared__ A shared[kThreads];
  uint32_t block = blockIdx.x, sub = threadIdx.x;
  const uint32_t lane = p.lanes.split(sub);
  const int k = static_cast<int>(p.tiles.split(block) * p.lanes.value() + lane);
  const int tap = static_cast<int>(p.taps.split(block));
  const int r = tap / p.S, s = tap % p.S;
  const int64_t slice = block;
  const bool active = k < p.K && static_cast<int>(sub) < p.subs;

  A sum{0};
  const int64_t end = min((slice + 1) * p.slice_positions, p.positions);
  for (int64_t position = slice * p.slice_positions + sub; active && position < end;
       position += p.subs) {
    uint32_t rest = static_cast<uint32_t>(position);
    const int column = static_cast<int>(p.columns.split(rest));
    const int row = static_cast<int>(p.rows.split(rest));
    const int64_t n = rest;
    const int h = row * p.stride_h - p.pad_top + r * p.dilation_h;
    const int w = column * p.stride_w - p.pad_left + s * p.dilation_w;
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(p.H) ||
        static_cast<unsigned>(w) >= static_cast<unsigned>(p.W))
      continue;
    const int64_t P = p.rows.value(), Q = p.columns.value(), in_row = p.W;
    const T d = dz[n * p.K * P * Q + k * p.z_channel + (row * Q + column) * p.z_pixel];
    const T value =
        x[n * p.C * p.H * in_row + k / p.multiplier * p.x_channel + (h * in_row + w) * p.x_pixel];
    sum += to_wide(d) * to_wide(value);
  }

  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int left = p.subs; left > 1;) {
    const int half = (left + 1) / 2;
    if (static_cast<int>(sub) + half < left)
      shared[threadIdx.x] += shared[threadIdx.x + half * p.lanes.value()];
    left = half;
    __syncthreads();
  }
  if (active && sub == 0) {
    const int taps = p.R * p.S;
    sums.store(slice, static_cast<int64_t>(k) * taps + (p.flip ? taps - 1 - tap : tap),
               shared[threadIdx.x]);
  }
}

}  // namespace

void depthwise_taps_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                          const Queue& queue) {
  // So many pixels keep a thread's sum short enough for float32.
  constexpr int64_t kMostPixels = 512, kLeastPixels = 8, kBlocks = 1024;
  const auto narrow = [](int64_t v) { return static_cast<int>(v); };
  const bool channels_last = p.layout == Layout::kNHWC;
  TapWgrad g{};
  g.H = narrow(p.H), g.W = narrow(p.W), g.C = narrow(p.C), g.K = narrow(p.K);
  g.R = narrow(p.R), g.S = narrow(p.S), g.multiplier = narrow(p.K / p.C);
  g.stride_h = narrow(p.stride_h), g.stride_w = narrow(p.stride_w);
  g.dilation_h = narrow(p.dilation_h), g.dilation_w = narrow(p.dilation_w);
  g.pad_top = narrow(p.pad_top), g.pad_left = narrow(p.pad_left);
  g.x_pixel = channels_last ? p.C : 1, g.x_channel = channels_last ? 1 : p.H * p.W;
  g.z_pixel = channels_last ? p.K : 1, g.z_channel = channels_last ? 1 : p.P * p.Q;
  g.flip = p.flip;
  const int64_t lanes = channels_last ? ceil_div(p.K, ceil_div(p.K, 64)) : 1;
  const int64_t tiles = ceil_div(p.K, lanes), taps = p.R * p.S;
  g.lanes = Divisor(lanes), g.tiles = Divisor(tiles), g.taps = Divisor(taps);
  g.columns = Divisor(p.Q), g.rows = Divisor(p.P);
  g.subs = narrow(kThreads / lanes);
  g.positions = p.N * p.P * p.Q;
  const int64_t share = g.positions * tiles * taps / (kBlocks * g.subs);
  g.slice_positions = g.subs * std::min(std::max(share, kLeastPixels), kMostPixels);
  const int64_t slices = ceil_div(g.positions, g.slice_positions);
  with_float(p.dtype, [&](auto element) {
    using T = decltype(element);
    const SliceSums<T> sums = slice_sums(static_cast<T*>(dw), slices, p.K * taps, queue);
    launch(depthwise_taps_wgrad_kernel<T>, dim3(static_cast<unsigned>(tiles * taps * slices)),
           dim3(kThreads), 0, queue, g, static_cast<const T*>(dz), static_cast<const T*>(x), sums);
    add_slices(sums, slices, queue);
  });
}

}  // namespace torchconv::cuda
