// Gathers (gather.h) with pixels contiguous (NCHW), depthwise and grouped.
//
// A block computes one tile of pixels of kFilters output channels; where planes are small, of
// several such sets of channels at once. For every input channel of the group it loads the tile's
// window into shared memory in the widest vectors that rows are aligned to, converted, with zeros
// for the padding, so that the sums need no bounds. Lanes lie along a row; a thread computes kRows
// x kColumns pixels and rolls the window's rows over their sums.
// Bound, depthwise: the bytes of x and y. Grouped: multiplications.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/gather.h"

namespace torchconv::cuda {

struct PlaneGather {
  Gather g;
  int64_t jobs;                             // N * chunks; a chunk is kFilters output channels
  Divisor group_chunks, groups;             // chunks of a group, groups
  Divisor h_tiles, w_tiles, row_sets;       // tiles of the image; sets of kRows rows in a tile
  Divisor lanes, slots;                     // threads along a row; jobs of a block
  int tile_h, tile_w, window_h, window_w;   // outputs of a tile, inputs of its window
  int pitch, vector;                        // of the window in shared memory; elements of one load
  Divisor vectors, window_rows;             // loads of a window's row
};

template <typename T, int kVector>
__device__ __forceinline__ void load_window(const PlaneGather& p, const T* in, int64_t job0,
                                            int channel, int h0, int w0, Wide<T>* window) {
  using A = Wide<T>;
  const Gather& g = p.g;
  const int64_t plane_size = static_cast<int64_t>(g.h.in) * g.w.in;
  const int loads = static_cast<int>(p.slots.value() * p.window_rows.value() * p.vectors.value());
  for (int i = static_cast<int>(threadIdx.x); i < loads; i += static_cast<int>(blockDim.x)) {
    uint32_t rest = static_cast<uint32_t>(i);
    const int w = w0 + static_cast<int>(p.vectors.split(rest)) * kVector;
    const uint32_t line = rest;  // of all windows
    const int h = h0 + static_cast<int>(p.window_rows.split(rest));
    const int64_t job = job0 + rest;
    Vector<T, kVector> loaded{};
    if (static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in) &&
        static_cast<unsigned>(w) < static_cast<unsigned>(g.w.in) && job < p.jobs) {
      const int64_t image = p.group_chunks.quotient(static_cast<uint32_t>(job));
      loaded = *reinterpret_cast<const Vector<T, kVector>*>(
          in + (image * g.in_channels + channel) * plane_size +
          static_cast<int64_t>(h) * g.w.in + w);
    }
    constexpr int kStore = kVector < kLanes<A> ? kVector : kLanes<A>;
    A* target = window + line * p.pitch + (w - w0);
#pragma unroll
    for (int v = 0; v < kVector; v += kStore) {
      Vector<A, kStore> wide;
#pragma unroll
      for (int u = 0; u < kStore; ++u) wide.element[u] = to_wide(loaded.element[v + u]);
      *reinterpret_cast<Vector<A, kStore>*>(target + v) = wide;
    }
  }
}

template <typename T, typename Tap, int kRows, int kColumns, int kFilters>
__global__ void __launch_bounds__(256, 2)
    gather_planes(const __grid_constant__ PlaneGather p, const T* in, const T* w,
                  const Epilogue<T> epilogue) {
  using A = Wide<T>;
  constexpr int R = Tap::R, kTaps = R * R;
  const Gather& g = p.g;
  A* windows = dynamic_shared<A>();  // [slots][window_h][pitch]
  A* weights = windows + p.slots.value() * p.window_h * p.pitch;  // [slots][R][R][kFilters]

  uint32_t block = blockIdx.x;
  const int tile_column = static_cast<int>(p.w_tiles.split(block)) * p.tile_w;
  const int tile_row = static_cast<int>(p.h_tiles.split(block)) * p.tile_h;
  const int64_t job0 = static_cast<int64_t>(block) * p.slots.value();
  const int h0 = g.h.first_input<Tap>(tile_row), w0 = g.w.first_input<Tap>(tile_column);
  const int w_aligned = w0 - (w0 & (p.vector - 1));

  uint32_t slot = threadIdx.x;
  const int x = static_cast<int>(p.lanes.split(slot));
  const int y = static_cast<int>(p.row_sets.split(slot));
  const int64_t job = job0 + slot;
  const bool active = slot < p.slots.value() && job < p.jobs;
  uint32_t image = static_cast<uint32_t>(job);  // n * groups + group
  const int o0 = static_cast<int>(p.group_chunks.split(image)) * kFilters;
  uint32_t group = image;
  group = p.groups.split(group);

  A z[kFilters * kRows * kColumns];
#pragma unroll
  for (int k = 0; k < kFilters; ++k) {
    const A bias = active && o0 + k < g.out_channels
                       ? epilogue.bias_of(static_cast<int64_t>(group) * g.out_channels + o0 + k)
                       : A{0};
#pragma unroll
    for (int i = 0; i < kRows * kColumns; ++i) z[k * kRows * kColumns + i] = bias;
  }

  constexpr int kRowStep = Tap::kSpread ? kRows / 2 : kRows * Tap::kStride;
  constexpr int kColumnStep = Tap::kSpread ? kColumns / 2 : kColumns * Tap::kStride;
  const A* window = windows + (slot * p.window_h + y * kRowStep) * p.pitch + x * kColumnStep +
                    (w0 - w_aligned);
  const A* filters = weights + slot * (kTaps * kFilters);
#pragma unroll 1
  for (int c = 0; c < g.in_channels; ++c) {
    if (c > 0) __syncthreads();
    const int count = static_cast<int>(p.slots.value()) * kTaps * kFilters;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
      const int k = i % kFilters, tap = i / kFilters % kTaps;
      uint32_t of = static_cast<uint32_t>(job0) + static_cast<uint32_t>(i / (kFilters * kTaps));
      const int o = static_cast<int>(p.group_chunks.split(of)) * kFilters + k;
      const int64_t offset = p.groups.split(of) * g.w_group + o * g.w_out + c * g.w_in +
                             (g.turned ? kTaps - 1 - tap : tap) * g.w_tap;
      weights[i] = o < g.out_channels ? to_wide(w[offset]) : A{0};
    }
    if (p.vector == kLanes<T>)
      load_window<T, kLanes<T>>(p, in, job0, c, h0, w_aligned, windows);
    else if (sizeof(T) == 2 && p.vector == 2)
      load_window<T, 2>(p, in, job0, c, h0, w_aligned, windows);
    else
      load_window<T, 1>(p, in, job0, c, h0, w_aligned, windows);
    __syncthreads();
    if (!active) continue;

    if constexpr (Tap::kDilated) {
      const int step = static_cast<int>(g.h.unit.value()) * p.pitch;
      const int unit = static_cast<int>(g.w.unit.value());
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int a = 0; a < kRows; ++a)
#pragma unroll
          for (int b = 0; b < kColumns; ++b) {
            const A value = window[tap / R * step + a * p.pitch + tap % R * unit + b];
#pragma unroll
            for (int k = 0; k < kFilters; ++k)
              z[(k * kRows + a) * kColumns + b] += filters[tap * kFilters + k] * value;
          }
    } else {
#pragma unroll
      for (int j = 0; j < Tap::window(kRows); ++j) {
        A value[Tap::window(kColumns)];
#pragma unroll
        for (int i = 0; i < Tap::window(kColumns); ++i) value[i] = window[j * p.pitch + i];
#pragma unroll
        for (int a = 0; a < kRows; ++a) {
          if (!Tap::meet(a, j)) continue;
#pragma unroll
          for (int i = 0; i < Tap::window(kColumns); ++i)
#pragma unroll
            for (int b = 0; b < kColumns; ++b) {
              if (!Tap::meet(b, i)) continue;
              const int tap = Tap::tap(a, j) * R + Tap::tap(b, i);
#pragma unroll
              for (int k = 0; k < kFilters; ++k)
                z[(k * kRows + a) * kColumns + b] += filters[tap * kFilters + k] * value[i];
            }
        }
      }
    }
  }
  if (!active) return;

  const int row = tile_row + y * kRows, column = tile_column + x * kColumns;
  const auto store = [&](T* out) {
#pragma unroll
    for (int k = 0; k < kFilters; ++k) {
      if (o0 + k >= g.out_channels) break;
      T* plane = out + (static_cast<int64_t>(image) * g.out_channels + o0 + k) * g.h.out * g.w.out;
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        if (row + a >= g.h.out || y * kRows + a >= p.tile_h) break;
#pragma unroll
        for (int b = 0; b < kColumns; ++b)
          if (column + b < g.w.out)
            plane[static_cast<int64_t>(row + a) * g.w.out + column + b] =
                from_wide<T>(z[(k * kRows + a) * kColumns + b]);
      }
    }
  };
  if (epilogue.preactivation != nullptr) store(epilogue.preactivation);
  activate_tile<kColumns>(epilogue.activation, z);
  store(epilogue.y);
}

template <typename T, typename Tap, int kRows, int kColumns, int kFilters>
void launch_gather_planes(const Gather& g, const T* in, const T* w, const Epilogue<T>& epilogue,
                          const Queue& queue) {
  constexpr int64_t kThreads = 256, kMostBytes = 46 * 1024;
  PlaneGather p{};
  p.g = g;
  const int64_t group_chunks = ceil_div(g.out_channels, kFilters);
  p.jobs = g.N * g.groups * group_chunks;
  if (p.jobs == 0) return;
  p.group_chunks = Divisor(group_chunks), p.groups = Divisor(g.groups);
  p.vector = 1;
  for (const int vector : {2, kLanes<T>})
    if (g.w.in % vector == 0 && aligned<T>(in, vector) && (sizeof(T) == 2 || vector > 2))
      p.vector = vector;
  const auto window = [](const GatherAxis& axis, int64_t tile) {
    return Tap::kSpread    ? tile / 2 + Tap::window(2) - 1
           : Tap::kDilated ? tile + 2 * static_cast<int64_t>(axis.unit.value())
                           : Tap::window(1) + (tile - 1) * Tap::kStride;
  };

  const int64_t row_sets = ceil_div(g.h.out, kRows), columns = ceil_div(g.w.out, kColumns);
  int64_t lanes = ceil_div(columns, ceil_div(columns, 64));
  int64_t sets = ceil_div(row_sets, ceil_div(row_sets, std::max<int64_t>(kThreads / lanes, 1)));
  const int64_t tiles = ceil_div(row_sets, sets) * ceil_div(columns, lanes);
  // Several jobs a block where planes are small, but not so many that multiprocessors idle.
  int64_t slots = std::max<int64_t>(kThreads / (lanes * sets), 1);
  slots = std::max<int64_t>(std::min(slots, p.jobs * tiles / 512), 1);
  const auto bytes = [&] {
    p.window_h = static_cast<int>(window(g.h, sets * kRows));
    p.window_w = static_cast<int>(window(g.w, lanes * kColumns));
    p.pitch = static_cast<int>(round_up(p.window_w + p.vector - 1, std::max(p.vector, 4)));
    return slots * (p.window_h * p.pitch + Tap::R * Tap::R * kFilters) *
           static_cast<int64_t>(sizeof(Wide<T>));
  };
  while (bytes() > kMostBytes) {
    int64_t& largest = slots > 1 ? slots : sets > 1 ? sets : lanes;
    largest = ceil_div(largest, 2);
  }
  p.tile_h = static_cast<int>(sets * kRows), p.tile_w = static_cast<int>(lanes * kColumns);
  const int64_t h_tiles = ceil_div(row_sets, sets), w_tiles = ceil_div(columns, lanes);
  p.h_tiles = Divisor(h_tiles), p.w_tiles = Divisor(w_tiles), p.row_sets = Divisor(sets);
  p.lanes = Divisor(lanes), p.slots = Divisor(slots);
  p.vectors = Divisor(p.pitch / p.vector), p.window_rows = Divisor(p.window_h);
  launch(gather_planes<T, Tap, kRows, kColumns, kFilters>,
         dim3(static_cast<unsigned>(ceil_div(p.jobs, slots) * h_tiles * w_tiles)),
         dim3(static_cast<unsigned>(round_up(lanes * sets * slots, 32))),
         static_cast<int>(bytes()), queue, p, in, w, epilogue);
}

}  // namespace torchconv::cuda
