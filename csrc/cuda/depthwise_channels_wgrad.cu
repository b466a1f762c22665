// Depthwise wgrad of small square kernels with channels contiguous (NHWC).
//
// A lane has four channels (two of float64) and the sums of kOwn rows of the kernel: all of a 3x3
// one, one row of larger ones. It goes through tiles of kRows x kColumns pixels of dz and rolls the
// rows of x that its kernel rows meet there over them, so that a loaded vector of x serves all
// their taps; the next row, or the first one and dz of the next tile, is under way meanwhile. The
// threads of a block go through a slice of all tiles, cut by the shape alone; their sums meet in
// shared memory, those of slices in block_sums.cu.
// A product with padding is not formed, for dz need not be finite: where numbers are finite it adds
// zero, and only where they are not are pixels looked at one by one.
// Bound: the bytes of x and dz.
#include <algorithm>

#include "cuda/block_sums.cuh"
#include "cuda/depthwise.h"
#include "cuda/packed.h"

namespace torchconv::cuda {
namespace {

struct ChannelWgrad {
  Gather g;  // fprop's
  int channels, vectors;
  Divisor lanes, lane_tiles, column_tiles, row_tiles;
  int subs;                             // threads that share the sums of the same channels
  uint32_t positions, slice_positions;  // tiles of all images; of a slice
};

// What depthwise_channel_gradients.cu takes, so that it does not come here.
template <typename T, typename Tap>
constexpr bool kComesWithDx = Tap::kSampling == Sampling::kUnit &&
                              (Tap::R == 3 ? sizeof(T) < 8 : Tap::R == 5 && sizeof(T) == 4);

template <typename T, typename Tap>
struct ChannelShare {
  static constexpr bool kNarrow = sizeof(T) == 2;
  static constexpr int kVector = sizeof(T) == 8 ? 2 : 4;
  static constexpr int kOwn = Tap::R == 3 ? 3 : 1, kParts = Tap::R / kOwn;
  static constexpr int kRows = kNarrow && Tap::R == 3 && Tap::kStride == 1 ? 2 : 1;
  static constexpr int kColumns = Tap::kStride == 2 || sizeof(T) == 8 ? 2 : 4;
  static constexpr int kWindowRows = (kRows - 1) * Tap::kStride + kOwn;
  static constexpr int kThreads = kNarrow && Tap::R == 5 ? 256 : 192;
};

template <typename T, typename Tap>
__global__ void __launch_bounds__(ChannelShare<T, Tap>::kThreads, 2)
    depthwise_channels_wgrad_kernel(const __grid_constant__ ChannelWgrad p, const T* dz, const T* x,
                                    const SliceSums<T> sums) {
  using A = Wide<T>;
  using Share = ChannelShare<T, Tap>;
  constexpr int R = Tap::R, kColumns = Share::kColumns, kVector = Share::kVector;
  constexpr int kOwn = Share::kOwn, kParts = Share::kParts, kRows = Share::kRows;
  constexpr int kWindow = Tap::window(kColumns), kWindowRows = Share::kWindowRows;
  constexpr int kThreads = Share::kThreads, kSums = kOwn * R * kVector;
  using Loaded = Packed<T, kVector>;
  const Gather& g = p.g;
  const int lanes = static_cast<int>(p.lanes.value());
  uint32_t slice = blockIdx.x, thread = threadIdx.x;
  const int lane = static_cast<int>(p.lanes.split(thread));
  const int part = static_cast<int>(thread) % kParts, sub = static_cast<int>(thread) / kParts;
  const int tile = static_cast<int>(p.lane_tiles.split(slice)), vector = tile * lanes + lane;
  const int64_t c = static_cast<int64_t>(vector) * kVector;
  const int unit_h = g.h.distance<Tap>(), unit_w = g.w.distance<Tap>();
  const int column_step = unit_w * p.channels;

  struct Spot {
    const T *gradient, *source;  // of windows that may begin outside
    uint32_t rows, columns;      // bits: what of x's window is inside, then what of dz's
  };
  const auto spot_of = [&](uint32_t position) {
    uint32_t n = position;
    const int column = g.w.first_output<Tap, kColumns>(p.column_tiles.split(n));
    const int row = g.h.first_output<Tap, kRows>(p.row_tiles.split(n));
    const int h0 = g.h.first_input<Tap>(row) + part * unit_h, w0 = g.w.first_input<Tap>(column);
    Spot at;
    at.gradient =
        dz + ((static_cast<int64_t>(n) * g.h.out + row) * g.w.out + column) * p.channels + c;
    at.source = x + ((static_cast<int64_t>(n) * g.h.in + h0) * g.w.in + w0) * p.channels + c;
    at.rows = inside_bits<kWindowRows, Tap::kDilated>(h0, unit_h, g.h.in) |
              inside_bits<kRows, Tap::kDilated>(row, unit_h, g.h.out) << kWindowRows;
    at.columns = inside_bits<kWindow, Tap::kDilated>(w0, unit_w, g.w.in) |
                 inside_bits<kColumns, Tap::kDilated>(column, unit_w, g.w.out) << kWindow;
    return at;
  };
  Loaded d_next[kRows][kColumns], x_next[kWindow];
  const auto load_dz = [&](const Spot& at) {
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      const uint32_t columns = (at.rows >> (kWindowRows + a) & 1) != 0 ? at.columns >> kWindow : 0;
      const T* line = at.gradient + static_cast<int64_t>(a * unit_h) * g.w.out * p.channels;
#pragma unroll
      for (int b = 0; b < kColumns; ++b)
        d_next[a][b] = (columns >> b & 1) != 0
                           ? *reinterpret_cast<const Loaded*>(line + b * column_step)
                           : Loaded{};
    }
  };
  const auto load_x = [&](const Spot& at, int j) {
    const uint32_t columns = (at.rows >> j & 1) != 0 ? at.columns : 0;
    const T* line = at.source + static_cast<int64_t>(j * unit_h) * g.w.in * p.channels;
#pragma unroll
    for (int i = 0; i < kWindow; ++i)
      x_next[i] = (columns >> i & 1) != 0 ? *reinterpret_cast<const Loaded*>(line + i * column_step)
                                          : Loaded{};
  };

  A z[kOwn][R][kVector] = {};
  const uint32_t end = min((slice + 1) * p.slice_positions, p.positions);
  uint32_t position = slice * p.slice_positions + static_cast<uint32_t>(sub);
  if (vector >= p.vectors || sub >= p.subs) position = end;
  Spot at{};
  if (position < end) {
    at = spot_of(position);
    load_dz(at);
    load_x(at, 0);
  }
  while (position < end) {
    A d[kRows][kColumns][kVector];
    // 0, or NaN where a number of a tile that reaches beyond an edge is not finite.
    A dz_odd{0};
#pragma unroll
    for (int a = 0; a < kRows; ++a)
#pragma unroll
      for (int b = 0; b < kColumns; ++b)
#pragma unroll
        for (int v = 0; v < kVector; ++v) d[a][b][v] = d_next[a][b].wide(v);
    constexpr uint32_t kAll = (1u << (kWindow + kColumns)) - 1, kAllDz = kAll >> kWindow;
    const bool edge = at.columns != kAll, over = at.columns >> kWindow != kAllDz;
    if (edge)
#pragma unroll
      for (int a = 0; a < kRows; ++a)
#pragma unroll
        for (int b = 0; b < kColumns; ++b)
#pragma unroll
          for (int v = 0; v < kVector; ++v) dz_odd += d[a][b][v] * A{0};

    const Spot here = at;
    position += static_cast<uint32_t>(p.subs);
    if (position < end) {
      at = spot_of(position);
      load_dz(at);
    }
#pragma unroll
    for (int j = 0; j < kWindowRows; ++j) {
      A value[kWindow][kVector];
#pragma unroll
      for (int i = 0; i < kWindow; ++i)
#pragma unroll
        for (int v = 0; v < kVector; ++v) value[i][v] = x_next[i].wide(v);
      if (j + 1 < kWindowRows)
        load_x(here, j + 1);
      else if (position < end)
        load_x(at, 0);
      if ((here.rows >> j & 1) == 0) continue;

      A odd = dz_odd;
      if (over)
#pragma unroll
        for (int i = 0; i < kWindow; ++i)
#pragma unroll
          for (int v = 0; v < kVector; ++v) odd += value[i][v] * A{0};
      const auto multiply = [&](auto bounded) {
#pragma unroll
        for (int a = 0; a < kRows; ++a) {
          const int r = j - a * Tap::kStride;
          if (r < 0 || r >= kOwn || (here.rows >> (kWindowRows + a) & 1) == 0) continue;
#pragma unroll
          for (int i = 0; i < kWindow; ++i) {
            if (decltype(bounded)::value && (here.columns >> i & 1) == 0) continue;
#pragma unroll
            for (int b = 0; b < kColumns; ++b) {
              if (!Tap::meet(b, i)) continue;
              if (decltype(bounded)::value && (here.columns >> (kWindow + b) & 1) == 0) continue;
#pragma unroll
              for (int v = 0; v < kVector; ++v) z[r][Tap::tap(b, i)][v] += d[a][b][v] * value[i][v];
            }
          }
        }
      };
      if (odd == A{0})
        multiply(std::false_type{});
      else
        multiply(std::true_type{});
    }
  }

  A* shared = dynamic_shared<A>();  // [kSums][kThreads]
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    shared[i * kThreads + static_cast<int>(threadIdx.x)] =
        z[i / (R * kVector)][i / kVector % R][i % kVector];
  __syncthreads();
  // Threads with the same lane and part have the same sums; they are `rows` of lanes apart.
  const int rows = kParts * lanes;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < rows * kSums; i += kThreads) {
    const int first = i % rows, value = i / rows;
    const int of = tile * lanes + first % lanes;
    if (of >= p.vectors) continue;
    A total{0};
#pragma unroll 4
    for (int share = 0; share < p.subs; ++share)
      total += shared[value * kThreads + first + share * rows];
    const int tap = first / lanes * (kOwn * R) + value / kVector;
    sums.store(slice,
               (static_cast<int64_t>(of) * kVector + value % kVector) * (R * R) +
                   (g.turned ? R * R - 1 - tap : tap),
               total);
  }
}

template <typename T, typename Tap>
void launch_channels_wgrad(const Gather& g, const T* dz, const T* x, T* dw, const Queue& queue) {
  using Share = ChannelShare<T, Tap>;
  constexpr int64_t kThreads = Share::kThreads;
  ChannelWgrad p{};
  p.g = g;
  p.channels = g.groups;
  p.vectors = g.groups / Share::kVector;
  const int64_t lanes = lanes_of_block(p.vectors, kThreads / Share::kParts);
  const int64_t lane_tiles = ceil_div(p.vectors, lanes);
  const int64_t subs = kThreads / Share::kParts / lanes;
  const int64_t column_tiles = g.w.tiles_of(Share::kColumns),
                row_tiles = g.h.tiles_of(Share::kRows);
  const int64_t positions = g.N * column_tiles * row_tiles;
  // So many tiles keep a thread's sums short enough for float32. The sums of a block cost about
  // four tiles.
  constexpr int64_t kMostTiles = 512 / (Share::kColumns * Share::kRows);
  const int64_t tiles = rounds_of_block(lane_tiles, positions, subs, kMostTiles, 132 * 2, 4);
  p.lanes = Divisor(lanes), p.lane_tiles = Divisor(lane_tiles);
  p.column_tiles = Divisor(column_tiles), p.row_tiles = Divisor(row_tiles);
  p.subs = static_cast<int>(subs);
  p.positions = static_cast<uint32_t>(positions);
  p.slice_positions = static_cast<uint32_t>(subs * tiles);
  const int64_t slices = ceil_div(positions, subs * tiles);
  const SliceSums<T> sums = slice_sums(dw, slices, g.groups * g.w_group, queue);
  const int64_t shared = kThreads * Share::kOwn * Tap::R * Share::kVector;
  launch(depthwise_channels_wgrad_kernel<T, Tap>, dim3(static_cast<unsigned>(lane_tiles * slices)),
         dim3(kThreads), static_cast<int>(shared * static_cast<int64_t>(sizeof(Wide<T>))), queue, p,
         dz, x, sums);
  add_slices(sums, slices, queue);
}

}  // namespace

bool depthwise_channels_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* dz, const void* x, void* dw, const Queue& queue) {
  bool done = false;
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    if (g.out_channels != 1 || g.groups % kLanes<T> != 0 || !aligned<T>(dz, kLanes<T>) ||
        !aligned<T>(x, kLanes<T>) || !window_fits(g))
      return;
    with_taps<T, false>(R, sampling, [&](auto taps) {
      using Tap = decltype(taps);
      if constexpr (!kComesWithDx<T, Tap>) {
        launch_channels_wgrad<T, Tap>(g, static_cast<const T*>(dz), static_cast<const T*>(x),
                                      static_cast<T*>(dw), queue);
        done = true;
      }
    });
  });
  return done;
}

}  // namespace torchconv::cuda
