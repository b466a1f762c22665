// Grouped 3x3 wgrad with channels contiguous (NHWC).
//
// A lane has four input and four output channels of a group and one row r of the kernel, whose 3 x
// 4 x 4 sums it keeps: it takes kColumns neighbouring pixels of dz and the window of x that row r
// meets there. A product with padding is not formed, for dz need not be finite. The threads of a
// block go through a slice of all pixels, cut by the shape alone; their sums meet in shared memory,
// those of slices in block_sums.cu.
// Bound: multiplications, for more than about four channels a group.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/channel_quads.cuh"
#include "cuda/grouped.h"

namespace torchconv::cuda {
namespace {

constexpr int kColumns = 4, kThreads = 192;

struct QuadWgrad {
  Gather g;                                          // fprop's
  Divisor lanes, lane_tiles, in_chunks, out_chunks;  // chunks: fours of a group's channels
  Divisor column_tiles, row_tiles;
  int pairs, subs;  // lanes in all; threads that share a lane's sums of a kernel row
  int64_t in_channels, out_channels;   // of a pixel
  int64_t positions, slice_positions;  // tiles of kColumns pixels
};

template <typename T, typename Tap, bool kAligned>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2)
    grouped_channels_wgrad_kernel(const __grid_constant__ QuadWgrad p, const T* dz, const T* x,
                                  const SliceSums<T> sums) {
  using A = Wide<T>;
  using Quad = Vector<T, kQuad>;
  constexpr int R = Tap::R, kWindow = Tap::window(kColumns);
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t block = blockIdx.x, thread = threadIdx.x;
  const int lane = static_cast<int>(p.lanes.split(thread));
  const int r = static_cast<int>(thread) % R, sub = static_cast<int>(thread) / R;
  const uint32_t tile = p.lane_tiles.split(block);
  uint32_t group = tile * p.lanes.value() + lane;
  const int64_t slice = block;
  const bool active = static_cast<int>(group) < p.pairs && sub < p.subs;
  const int c0 = static_cast<int>(p.in_chunks.split(group)) * kQuad;
  const int o0 = static_cast<int>(p.out_chunks.split(group)) * kQuad;
  const int inputs = min(kQuad, g.in_channels - c0), outputs = min(kQuad, g.out_channels - o0);
  const int64_t c = static_cast<int64_t>(group) * g.in_channels + c0;
  const int64_t k = static_cast<int64_t>(group) * g.out_channels + o0;
  const int unit_w = g.w.distance<Tap>();

  A z[R][kQuad][kQuad] = {};
  const int64_t end = min((slice + 1) * p.slice_positions, p.positions);
  for (int64_t position = slice * p.slice_positions + sub; active && position < end;
       position += p.subs) {
    uint32_t rest = static_cast<uint32_t>(position);
    const int column = g.w.first_output<Tap, kColumns>(p.column_tiles.split(rest));
    const int row = static_cast<int>(p.row_tiles.split(rest));
    const int64_t n = rest;
    const int h = g.h.first_input<Tap>(row) + r * g.h.distance<Tap>();
    if (static_cast<unsigned>(h) >= static_cast<unsigned>(g.h.in)) continue;
    const int w0 = g.w.first_input<Tap>(column);

    const T* gradient = dz + ((n * g.h.out + row) * g.w.out + column) * p.out_channels + k;
    const T* source = x + ((n * g.h.in + h) * g.w.in + w0) * p.in_channels + c;
    Quad d[kColumns], values[kWindow];
#pragma unroll
    for (int b = 0; b < kColumns; ++b)
      d[b] = load_quad<kAligned>(gradient + b * unit_w * p.out_channels, outputs,
                                 column + b * unit_w < g.w.out);
#pragma unroll
    for (int i = 0; i < kWindow; ++i)
      values[i] = load_quad<kAligned>(
          source + i * unit_w * p.in_channels, inputs,
          static_cast<unsigned>(w0 + i * unit_w) < static_cast<unsigned>(g.w.in));

#pragma unroll
    for (int i = 0; i < kWindow; ++i) {
      if (static_cast<unsigned>(w0 + i * unit_w) >= static_cast<unsigned>(g.w.in)) continue;
#pragma unroll
      for (int b = 0; b < kColumns; ++b) {
        if (!Tap::meet(b, i) || column + b * unit_w >= g.w.out) continue;
#pragma unroll
        for (int o = 0; o < kQuad; ++o)
#pragma unroll
          for (int each = 0; each < kQuad; ++each)
            z[Tap::tap(b, i)][o][each] +=
                to_wide(d[b].element[o]) * to_wide(values[i].element[each]);
      }
    }
  }

  A* shared = dynamic_shared<A>();  // [R][kQuad][kQuad][kThreads]
#pragma unroll
  for (int i = 0; i < R * kQuad * kQuad; ++i)
    shared[i * kThreads + static_cast<int>(threadIdx.x)] =
        z[i / (kQuad * kQuad)][i / kQuad % kQuad][i % kQuad];
  __syncthreads();
  // Threads with the same lane and r have the same sums; they are `rows` of lanes apart.
  const int rows = R * lanes;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * R * kQuad * kQuad; i += kThreads) {
    const int first = i % rows, value = i / rows;
    uint32_t pair = tile * p.lanes.value() + first % lanes;
    if (static_cast<int>(pair) >= p.pairs) continue;
    const int in = static_cast<int>(p.in_chunks.split(pair)) * kQuad + value % kQuad;
    const int out = static_cast<int>(p.out_chunks.split(pair)) * kQuad + value / kQuad % kQuad;
    if (in >= g.in_channels || out >= g.out_channels) continue;
    A total{0};
    for (int share = 0; share < p.subs; ++share)
      total += shared[value * kThreads + first + share * rows];
    const int tap = first / lanes * R + value / (kQuad * kQuad);
    sums.store(slice,
               pair * g.w_group + out * g.w_out + in * g.w_in +
                   (g.turned ? R * R - 1 - tap : tap) * g.w_tap,
               total);
  }
}

template <typename T, typename Tap, bool kAligned>
void run(const Gather& g, const T* dz, const T* x, T* dw, const Queue& queue) {
  // So many tiles keep a thread's sums short enough for float32.
  constexpr int64_t kMostTiles = 512 / kColumns, kLeastTiles = 8, kBlocks = 512;
  QuadWgrad p{};
  p.g = g;
  const int64_t in_chunks = ceil_div(g.in_channels, kQuad);
  const int64_t out_chunks = ceil_div(g.out_channels, kQuad);
  const int64_t pairs = g.groups * in_chunks * out_chunks;
  const int64_t lanes = ceil_div(pairs, ceil_div(pairs, 32)), lane_tiles = ceil_div(pairs, lanes);
  p.in_chunks = Divisor(in_chunks), p.out_chunks = Divisor(out_chunks);
  p.pairs = static_cast<int>(pairs);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.subs = static_cast<int>(kThreads / (lanes * Tap::R));
  p.in_channels = static_cast<int64_t>(g.groups) * g.in_channels;
  p.out_channels = static_cast<int64_t>(g.groups) * g.out_channels;
  const int64_t column_tiles = g.w.tiles_of(kColumns);
  p.column_tiles = Divisor(column_tiles), p.row_tiles = Divisor(g.h.out);
  p.positions = g.N * g.h.out * column_tiles;
  const int64_t share = p.positions * lane_tiles / (kBlocks * p.subs);
  p.slice_positions = p.subs * std::min(std::max(share, kLeastTiles), kMostTiles);
  const int64_t slices = ceil_div(p.positions, p.slice_positions);
  const SliceSums<T> sums = slice_sums(dw, slices, g.groups * g.w_group, queue);
  launch(grouped_channels_wgrad_kernel<T, Tap, kAligned>,
         dim3(static_cast<unsigned>(lane_tiles * slices)), dim3(kThreads),
         static_cast<int>(kThreads * Tap::R * kQuad * kQuad * sizeof(Wide<T>)), queue, p, dz, x,
         sums);
  add_slices(sums, slices, queue);
}

}  // namespace

void grouped_channels_wgrad(DType dtype, Sampling sampling, const Gather& g, const void* dz,
                            const void* x, void* dw, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const T* gradient = static_cast<const T*>(dz);
    const T* image = static_cast<const T*>(x);
    constexpr bool kVectors = sizeof(T) < 8;  // of float64 there is the general form alone
    const bool quads = kVectors && g.in_channels % kQuad == 0 && g.out_channels % kQuad == 0 &&
                       aligned<T>(dz, kQuad) && aligned<T>(x, kQuad);
    with_group_taps<false>(sampling, [&](auto taps) {
      using Tap = decltype(taps);
      if (quads)
        run<T, Tap, kVectors>(g, gradient, image, static_cast<T*>(dw), queue);
      else
        run<T, Tap, false>(g, gradient, image, static_cast<T*>(dw), queue);
    });
  });
}

}  // namespace torchconv::cuda
