// Gathers (gather.h) with pixels contiguous (NCHW), depthwise and grouped.
//
// A block computes the tiles of plane_tile.cuh for kFilters output channels, or several such sets
// of them, and goes through the input channels of the group. A thread rolls the rows of its window
// over the sums of its pixels.
// Bound, depthwise: the bytes of x and y. Grouped: multiplications.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/plane_tile.cuh"

namespace torchconv::cuda {

// Of a block: many sums and weights a thread need its registers.
template <int kFilters>
inline constexpr int kPlaneThreads = kFilters > 1 ? 128 : 256;

struct PlaneGather {
  Gather g;
  PlaneTiling t;
  int64_t jobs;                  // N * chunks; a chunk is kFilters output channels of a group
  Divisor group_chunks, groups;  // chunks of a group, groups
  bool whole;                    // a job is a plane, and a tile a whole one
  PlaneRun run;
};

template <typename T, typename Tap, int kRows, int kColumns, int kFilters>
__global__ void __launch_bounds__(kPlaneThreads<kFilters>, Tap::R == 3 ? 3 : 2)
    gather_planes(const __grid_constant__ PlaneGather p, const T* in, const T* w,
                  const Epilogue<T> epilogue) {
  using A = Wide<T>;
  constexpr int R = Tap::R, kTaps = R * R;
  const Gather& g = p.g;
  const PlaneTiling& t = p.t;
  A* windows = dynamic_shared<A>();            // [slots][window_h][pitch]
  A* weights = windows + t.window_elements();  // [slots][R][R][kFilters]

  uint32_t block = blockIdx.x;
  const int tile_column = static_cast<int>(t.w_tiles.split(block)) * t.tile_w;
  const int tile_row = static_cast<int>(t.h_tiles.split(block)) * t.tile_h;
  const int64_t job0 = static_cast<int64_t>(block) * t.slots.value();
  const int h0 = g.h.first_input<Tap>(tile_row), w0 = g.w.first_input<Tap>(tile_column);
  const int w_aligned = w0 - (w0 & (t.vector - 1));

  uint32_t slot = threadIdx.x;
  const int x = static_cast<int>(t.lanes.split(slot));
  const int y = static_cast<int>(t.row_sets.split(slot));
  const int64_t job = job0 + slot;
  const bool active = slot < t.slots.value() && job < p.jobs;
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
  const A* window =
      windows + (slot * t.window_h + y * kRowStep) * t.pitch + x * kColumnStep + (w0 - w_aligned);
  const A* filters = weights + slot * (kTaps * kFilters);
#pragma unroll 1
  for (int c = 0; c < g.in_channels; ++c) {
    if (c > 0) __syncthreads();
    const int count = static_cast<int>(t.slots.value()) * kTaps * kFilters;
    const auto weight_of = [&](int i) {
      const int k = i % kFilters, tap = i / kFilters % kTaps;
      uint32_t of = static_cast<uint32_t>(job0) + static_cast<uint32_t>(i / (kFilters * kTaps));
      const int o = static_cast<int>(p.group_chunks.split(of)) * kFilters + k;
      const int64_t offset = p.groups.split(of) * g.w_group + o * g.w_out + c * g.w_in +
                             (g.turned ? kTaps - 1 - tap : tap) * g.w_tap;
      return i < count && o < g.out_channels ? w[offset] : from_wide<T>(A{0});
    };
    // Under way while the windows arrive.
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const T first = weight_of(thread);
    const auto plane_of = [&](uint32_t of) -> const T* {
      if (job0 + of >= p.jobs) return nullptr;
      const int64_t source = p.group_chunks.quotient(static_cast<uint32_t>(job0) + of);
      return in + (source * g.in_channels + c) * g.h.in * g.w.in;
    };
    if (kFilters == 1 && p.whole)
      load_planes<T>(t, g, p.run, in + job0 * g.h.in * g.w.in,
                     static_cast<int>(min(static_cast<int64_t>(t.slots.value()), p.jobs - job0)),
                     h0, w_aligned, windows);
    else
      load_windows<T>(t, g, plane_of, h0, w_aligned, windows);
    if (thread < count) weights[thread] = to_wide(first);
    for (int i = thread + threads; i < count; i += threads) weights[i] = to_wide(weight_of(i));
    __syncthreads();
    if (!active) continue;

    if constexpr (Tap::kDilated) {
      const int step = static_cast<int>(g.h.unit.value()) * t.pitch;
      const int unit = static_cast<int>(g.w.unit.value());
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
        for (int a = 0; a < kRows; ++a)
#pragma unroll
          for (int b = 0; b < kColumns; ++b) {
            const A value = window[tap / R * step + a * t.pitch + tap % R * unit + b];
#pragma unroll
            for (int k = 0; k < kFilters; ++k)
              z[(k * kRows + a) * kColumns + b] += filters[tap * kFilters + k] * value;
          }
    } else {
#pragma unroll
      for (int j = 0; j < Tap::window(kRows); ++j) {
        A value[Tap::window(kColumns)];
#pragma unroll
        for (int i = 0; i < Tap::window(kColumns); ++i) value[i] = window[j * t.pitch + i];
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
        if (row + a >= g.h.out || y * kRows + a >= t.tile_h) break;
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
  const int64_t group_chunks = ceil_div(g.out_channels, kFilters);
  PlaneGather p{};
  p.g = g;
  p.jobs = g.N * g.groups * group_chunks;
  p.group_chunks = Divisor(group_chunks), p.groups = Divisor(g.groups);
  p.t = plane_tiling<T, Tap, kRows, kColumns, kPlaneThreads<kFilters>>(g, in, p.jobs, kFilters);
  if constexpr (kFilters == 1) {
    // Slots whose planes begin at a vector.
    const int64_t plane = static_cast<int64_t>(g.h.in) * g.w.in;
    int64_t slots = p.t.slots.value();
    while (slots % kRunVector<T> != 0 && slots * plane % kRunVector<T> != 0) --slots;
    const int h0 = g.h.origin, w0 = g.w.origin - (g.w.origin & (p.t.vector - 1));
    p.whole = g.in_channels == 1 && g.out_channels == 1 && p.t.h_tiles.value() == 1 &&
              p.t.w_tiles.value() == 1 && slots > 0 && plane > 0 && h0 <= 0 && w0 <= 0 &&
              h0 + p.t.window_h >= g.h.in && w0 + p.t.pitch >= g.w.in &&
              aligned<T>(in, kRunVector<T>);
    if (p.whole) {
      p.t.slots = Divisor(slots);
      p.t.threads =
          static_cast<int>(round_up(slots * p.t.lanes.value() * p.t.row_sets.value(), 32));
      p.run = {Divisor(plane), Divisor(g.w.in)};
    }
  }
  const int64_t slots = p.t.slots.value(), tiles = p.t.h_tiles.value() * p.t.w_tiles.value();
  launch(gather_planes<T, Tap, kRows, kColumns, kFilters>,
         dim3(static_cast<unsigned>(ceil_div(p.jobs, slots) * tiles)),
         dim3(static_cast<unsigned>(p.t.threads)),
         static_cast<int>((p.t.window_elements() + slots * Tap::R * Tap::R * kFilters) *
                          static_cast<int64_t>(sizeof(Wide<T>))),
         queue, p, in, w, epilogue);
}

}  // namespace torchconv::cuda
