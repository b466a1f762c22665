// Depthwise wgrad of small square kernels with channels contiguous (NHWC).
//
// A lane has as many channels as 16 bytes hold (8, for the many sums of large kernels in two-byte
// types) and one row r of the kernel, whose R sums it keeps: it takes kColumns neighbouring pixels
// of dz and the window of x that row r meets there, so that a loaded vector of x serves all taps of
// the row. The lanes of other rows find the same dz in L1. A product with padding is not formed,
// for dz need not be finite. The threads of a block go through a slice of all pixels, cut by the
// shape alone; their sums meet in shared memory, those of slices in block_sums.cu.
// Bound: the bytes of x and dz.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"

namespace torchconv::cuda {
namespace {

constexpr int kColumns = 4, kThreads = 192;

struct ChannelWgrad {
  Gather g;  // fprop's
  int channels, vectors;
  Divisor lanes, lane_tiles, column_tiles, row_tiles;
  int subs;                            // threads that share a kernel row of the same channels
  int64_t positions, slice_positions;  // tiles of kColumns pixels
};

template <typename T, typename Tap, int kVector>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_channels_wgrad_kernel(const __grid_constant__ ChannelWgrad p, const T* dz, const T* x,
                                    const SliceSums<T> sums) {
  using A = Wide<T>;
  using Loaded = Vector<T, kVector>;
  constexpr int R = Tap::R, kWindow = Tap::window(kColumns);
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t block = blockIdx.x, thread = threadIdx.x;
  const int lane = static_cast<int>(p.lanes.split(thread));
  const int r = static_cast<int>(thread) % R, sub = static_cast<int>(thread) / R;
  const int tile = static_cast<int>(p.lane_tiles.split(block)), vector = tile * lanes + lane;
  const int64_t slice = block, c = static_cast<int64_t>(vector) * kVector;
  const bool active = vector < p.vectors && sub < p.subs;
  const int unit_w = g.w.distance<Tap>();

  A z[R][kVector] = {};
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

    const T* gradient = dz + ((n * g.h.out + row) * g.w.out + column) * p.channels + c;
    const T* source = x + ((n * g.h.in + h) * g.w.in + w0) * static_cast<int64_t>(p.channels) + c;
    Loaded d[kColumns], values[kWindow];
#pragma unroll
    for (int b = 0; b < kColumns; ++b)
      d[b] = column + b * unit_w < g.w.out
                 ? *reinterpret_cast<const Loaded*>(gradient +
                                                    static_cast<int64_t>(b) * unit_w * p.channels)
                 : Loaded{};
#pragma unroll
    for (int i = 0; i < kWindow; ++i)
      values[i] = static_cast<unsigned>(w0 + i * unit_w) < static_cast<unsigned>(g.w.in)
                      ? *reinterpret_cast<const Loaded*>(source + static_cast<int64_t>(i) * unit_w *
                                                                      p.channels)
                      : Loaded{};

    const auto multiply = [&](auto bounded) {
#pragma unroll
      for (int i = 0; i < kWindow; ++i) {
        if (decltype(bounded)::value &&
            static_cast<unsigned>(w0 + i * unit_w) >= static_cast<unsigned>(g.w.in))
          continue;
#pragma unroll
        for (int b = 0; b < kColumns; ++b) {
          if (!Tap::meet(b, i)) continue;
          if (decltype(bounded)::value && column + b * unit_w >= g.w.out) continue;
#pragma unroll
          for (int v = 0; v < kVector; ++v)
            z[Tap::tap(b, i)][v] += to_wide(d[b].element[v]) * to_wide(values[i].element[v]);
        }
      }
    };
    if (w0 >= 0 && w0 + (kWindow - 1) * unit_w < g.w.in &&
        column + (kColumns - 1) * unit_w < g.w.out)
      multiply(std::false_type{});
    else
      multiply(std::true_type{});
  }

  A* shared = dynamic_shared<A>();  // [R][kVector][threads]
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll
  for (int i = 0; i < R * kVector; ++i)
    shared[i * threads + static_cast<int>(threadIdx.x)] = z[i / kVector][i % kVector];
  __syncthreads();
  // Threads with the same lane and r have the same sums; they are `rows` of lanes apart.
  const int rows = R * lanes;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * R * kVector; i += threads) {
    const int first = i % rows, value = i / rows;
    const int of = tile * lanes + first % lanes;
    if (of >= p.vectors) continue;
    A total{0};
    for (int share = 0; share < p.subs; ++share)
      total += shared[value * threads + first + share * rows];
    const int tap = first / lanes * R + value / kVector;
    sums.store(slice,
               (static_cast<int64_t>(of) * kVector + value % kVector) * (R * R) +
                   (g.turned ? R * R - 1 - tap : tap),
               total);
  }
}

template <typename T, typename Tap, int kVector>
void run(const Gather& g, const T* dz, const T* x, T* dw, const Queue& queue) {
  // So many tiles keep a thread's sums short enough for float32.
  constexpr int64_t kMostTiles = 512 / kColumns, kLeastTiles = 4, kBlocks = 1024;
  ChannelWgrad p{};
  p.g = g;
  p.channels = g.groups;
  p.vectors = g.groups / kVector;
  const int64_t lanes = ceil_div(p.vectors, ceil_div(p.vectors, 16));
  const int64_t lane_tiles = ceil_div(p.vectors, lanes);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.subs = static_cast<int>(std::max<int64_t>(kThreads / (lanes * Tap::R), 1));
  const int64_t column_tiles = g.w.tiles_of(kColumns);
  p.column_tiles = Divisor(column_tiles), p.row_tiles = Divisor(g.h.out);
  p.positions = g.N * g.h.out * column_tiles;
  const int64_t share = p.positions * lane_tiles / (kBlocks * p.subs);
  p.slice_positions = p.subs * std::min(std::max(share, kLeastTiles), kMostTiles);
  const int64_t slices = ceil_div(p.positions, p.slice_positions);
  const SliceSums<T> sums = slice_sums(dw, slices, g.groups * g.w_group, queue);
  const int64_t threads = round_up(lanes * Tap::R * p.subs, 32);
  launch(depthwise_channels_wgrad_kernel<T, Tap, kVector>,
         dim3(static_cast<unsigned>(lane_tiles * slices)), dim3(static_cast<unsigned>(threads)),
         static_cast<int>(threads * Tap::R * kVector * static_cast<int64_t>(sizeof(Wide<T>))),
         queue, p, dz, x, sums);
  add_slices(sums, slices, queue);
}

}  // namespace

bool depthwise_channels_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* dz, const void* x, void* dw, const Queue& queue) {
  bool done = false;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    if (g.out_channels != 1 || g.groups % kLanes<T> != 0 || !aligned<T>(dz, kLanes<T>) ||
        !aligned<T>(x, kLanes<T>))
      return;
    done = true;
    with_taps<T, false>(R, sampling, [&](auto taps) {
      using Tap = decltype(taps);
      constexpr int kVector = sizeof(T) == 2 && (Tap::R > 3) ? 4 : kLanes<T>;
      run<T, Tap, kVector>(g, static_cast<const T*>(dz), static_cast<const T*>(x),
                           static_cast<T*>(dw), queue);
    });
  });
  return done;
}

}  // namespace torchconv::cuda
