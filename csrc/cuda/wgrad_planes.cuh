// Weight gradients of small square kernels with pixels contiguous (NCHW), depthwise and grouped.
//
// A block has one input channel and kFilters output channels, of whose R x R sums every thread
// keeps its own. It goes through a slice of the tiles of plane_tile.cuh of all images, several
// small images at once: x comes from the window in shared memory, and each thread loads the dz of
// its pixels. A product with padding is not formed, for dz need not be finite. Slices are cut by
// the shape alone; block_sums.cuh adds over the block's threads and over slices.
// Bound, depthwise: the bytes of x and dz. Grouped: multiplications.
#pragma once

#include "cuda/block_sums.cuh"
#include "cuda/plane_tile.cuh"

namespace torchconv::cuda {

struct PlaneWgrad {
  Gather g;  // fprop's
  PlaneTiling t;
  Divisor chunks, in_channels, groups;  // chunks of kFilters output channels of a group
  int64_t batches, slice_batches;       // sets of tiles that a block works on at once; of a slice
};

template <typename T, typename Tap, int kRows, int kFilters>
__global__ void __launch_bounds__(256, 2)
    wgrad_planes(const __grid_constant__ PlaneWgrad p, const T* dz, const T* x,
                 const SliceSums<T> sums) {
  using A = Wide<T>;
  constexpr int R = Tap::R, kTaps = R * R;
  const Gather& g = p.g;
  const PlaneTiling& t = p.t;
  A* windows = dynamic_shared<A>();  // [slots][window_h][pitch]

  uint32_t rest = blockIdx.x;
  const int c = static_cast<int>(p.in_channels.split(rest));
  const int o0 = static_cast<int>(p.chunks.split(rest)) * kFilters;
  const int group = static_cast<int>(p.groups.split(rest));
  const int64_t slice = rest;

  uint32_t slot = threadIdx.x;
  const int lane = static_cast<int>(t.lanes.split(slot));
  const int set = static_cast<int>(t.row_sets.split(slot));
  const A* window =
      windows + (slot * t.window_h + set * kRows * Tap::kStride) * t.pitch + lane * Tap::kStride;
  const int unit_h = g.h.distance<Tap>(), unit_w = g.w.distance<Tap>();

  A z[kFilters * kTaps] = {};
  const int64_t end = min((slice + 1) * p.slice_batches, p.batches);
  for (int64_t batch = slice * p.slice_batches; batch < end; ++batch) {
    uint32_t images = static_cast<uint32_t>(batch);
    const int tile_column = static_cast<int>(t.w_tiles.split(images)) * t.tile_w;
    const int tile_row = static_cast<int>(t.h_tiles.split(images)) * t.tile_h;
    const int64_t n0 = static_cast<int64_t>(images) * t.slots.value(), n = n0 + slot;
    const int h0 = g.h.first_input<Tap>(tile_row), w0 = g.w.first_input<Tap>(tile_column);
    const int shift = w0 & (t.vector - 1);
    __syncthreads();
    const auto plane_of = [&](uint32_t of) -> const T* {
      const int64_t image = n0 + of;
      return image < g.N ? x + ((image * g.groups + group) * g.in_channels + c) * g.h.in * g.w.in
                         : nullptr;
    };
    // dz is under way while x arrives. `rows`: of the thread, inside the image and the tile.
    const int row = tile_row + set * kRows, column = tile_column + lane;
    const bool active = slot < t.slots.value() && n < g.N && column < g.w.out;
    const int rows = active ? min(kRows, min(g.h.out, tile_row + t.tile_h) - row) : 0;
    T raw[kFilters][kRows];
#pragma unroll
    for (int k = 0; k < kFilters; ++k)
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        const int64_t plane = (n * g.groups + group) * g.out_channels + o0 + k;
        raw[k][a] = a < rows && o0 + k < g.out_channels
                        ? dz[(plane * g.h.out + row + a) * g.w.out + column]
                        : from_wide<T>(A{0});
      }
    load_windows<T>(t, g, plane_of, h0, w0 - shift, windows);

    __syncthreads();
    A d[kFilters][kRows];
#pragma unroll
    for (int k = 0; k < kFilters; ++k)
#pragma unroll
      for (int a = 0; a < kRows; ++a) d[k][a] = to_wide(raw[k][a]);

    bool inside[R];
#pragma unroll
    for (int s = 0; s < R; ++s)
      inside[s] = static_cast<unsigned>(w0 + lane * Tap::kStride + s * unit_w) <
                  static_cast<unsigned>(g.w.in);
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      if (a >= rows) break;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int j = a * Tap::kStride + r * unit_h;
        if (static_cast<unsigned>(h0 + set * kRows * Tap::kStride + j) >=
            static_cast<unsigned>(g.h.in))
          continue;
#pragma unroll
        for (int s = 0; s < R; ++s) {
          if (!inside[s]) continue;
          const A value = window[j * t.pitch + s * unit_w + shift];
#pragma unroll
          for (int k = 0; k < kFilters; ++k) z[k * kTaps + r * R + s] += d[k][a] * value;
        }
      }
    }
  }

  block_sums<kFilters * kTaps>(z, windows, [&](int i, A total) {
    const int o = o0 + i / kTaps, tap = i % kTaps;
    if (o >= g.out_channels) return;
    sums.store(
        slice,
        group * g.w_group + o * g.w_out + c * g.w_in + (g.turned ? kTaps - 1 - tap : tap) * g.w_tap,
        total);
  });
}

template <typename T, typename Tap, int kRows, int kFilters>
void launch_wgrad_planes(const Gather& g, const T* dz, const T* x, T* dw, const Queue& queue) {
  // So many batches a slice keep a thread's sums short enough for float32.
  constexpr int64_t kMostBatches = 512 / kRows, kBlocks = 512;
  PlaneWgrad p{};
  p.g = g;
  const int64_t chunks = ceil_div(g.out_channels, kFilters);
  const int64_t columns = g.groups * chunks * g.in_channels;
  p.chunks = Divisor(chunks), p.in_channels = Divisor(g.in_channels), p.groups = Divisor(g.groups);
  p.t = plane_tiling<T, Tap, kRows, 1, 256>(g, x, 512 * g.N, 0);
  p.batches = ceil_div(g.N, p.t.slots.value()) * p.t.h_tiles.value() * p.t.w_tiles.value();
  const int64_t wanted = std::max(ceil_div(kBlocks, columns), ceil_div(p.batches, kMostBatches));
  p.slice_batches = ceil_div(p.batches, std::min(wanted, p.batches));
  const int64_t slices = ceil_div(p.batches, p.slice_batches);
  const SliceSums<T> sums = slice_sums(dw, slices, g.groups * g.w_group, queue);
  const int64_t elements =
      std::max(p.t.window_elements(), p.t.threads / 32 * power_of_two(kFilters * Tap::R * Tap::R));
  launch(wgrad_planes<T, Tap, kRows, kFilters>, dim3(static_cast<unsigned>(columns * slices)),
         dim3(static_cast<unsigned>(p.t.threads)),
         static_cast<int>(elements * static_cast<int64_t>(sizeof(Wide<T>))), queue, p, dz, x, sums);
  add_slices(sums, slices, queue);
}

}  // namespace torchconv::cuda
