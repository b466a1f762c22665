// Both gradients of mma_planes.h's convolutions from one reading of dz, for the files that
// instantiate them for one type each: a block has all of dw in its registers, and of each tile of
// 64 pixels, in shared memory, it adds dz * x' to that and stores w' * dz. Tiles are divided among
// the parts of dw in turn, so that blocks which run together read neighbouring memory; the parts,
// which another kernel adds, are as many as the multiprocessors of a large device, by the shape
// alone. Bound: dz and x read, and dx written, once.
#pragma once

#include <algorithm>

#include "core/range.h"
#include "cuda/mma_planes.h"
#include "cuda/mma_planes_tile.h"
#include "cuda/mma_wgrad_kernel.h"

namespace torchconv::cuda {

// Dw's tile is filters x channels, Dx's is channels x pixels.
template <typename Dw_, typename Dx_>
struct GradientTiles {
  using Dw = Dw_;
  using Dx = Dx_;
  static_assert(Dw::kThreads == Dx::kThreads && Dw::kN == Dx::kM && Dx::kN == kRowPixels);
  static constexpr int kRows = Dw::kM + Dw::kN;
  static constexpr int kStageBytes = kRows * kRowBytes;
  static int shared_bytes(int filters) {
    return ResidentFilters::bytes<Dx::kM>(filters) + Dw::kStages * kStageBytes;
  }
};

template <typename T, typename Tiles>
__global__ void __launch_bounds__(Tiles::Dw::kThreads, 1)
    mma_planes_gradients_kernel(const __grid_constant__ PlanesGradients p,
                                const Epilogue<T> to_dx) {
  using Dw = typename Tiles::Dw;
  using Dx = typename Tiles::Dx;
  constexpr int kThreads = Dw::kThreads, kPass = kThreads / kRowUnits, kStages = Dw::kStages;
  const WgradProblem& d = p.dw;
  unsigned char* filters = dynamic_shared<unsigned char>();
  const SharedAddress staged = shared_address(filters + ResidentFilters::bytes<Dx::kM>(d.filters));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.x), step = static_cast<int>(d.parts);
  const int all_tiles = static_cast<int>((d.pixels + kRowPixels - 1) / kRowPixels);
  const int tiles = (all_tiles - part + step - 1) / step;
  const int64_t plane = d.plane.value();
  const bool wants_dx = to_dx.y != nullptr;

  if (wants_dx)
    stage_filters<T, Dx::kM, kThreads>(filters, static_cast<const T*>(p.w), /*turned=*/true, 0,
                                       d.channels, d.filters);

  const int unit = thread % kRowUnits, row = thread / kRowUnits;
  const int place = place_in_plane_rows(row, unit);
  const auto load = [&](int number, int stage) {
    const int64_t pixel = (int64_t{number} * step + part) * kRowPixels + 8 * unit;
    const bool is_pixel = number < tiles && pixel < d.pixels;
    uint32_t sample = is_pixel ? static_cast<uint32_t>(pixel) : 0;
    const int64_t in_plane = d.plane.split(sample);
    const SharedAddress to =
        staged + static_cast<SharedAddress>(stage * Tiles::kStageBytes + place);
    const auto stage_planes = [&](auto extent, const void* image, int planes, SharedAddress at) {
      const T* from = static_cast<const T*>(image) + sample * (planes * plane) + in_plane;
#pragma unroll
      for (int i = 0; i < decltype(extent)::value / kPass; ++i) {
        const bool inside = all_of(is_pixel, row + i * kPass < planes);
        copy_async<16>(at + static_cast<SharedAddress>(i * kPass * kRowBytes),
                       inside ? from + (row + i * kPass) * plane : static_cast<const T*>(image),
                       inside);
      }
    };
    stage_planes(std::integral_constant<int, Dw::kM>{}, d.dz, d.filters, to);
    stage_planes(std::integral_constant<int, Dw::kN>{}, d.x, d.channels, to + Dw::kM * kRowBytes);
  };

  const int filter_m = warp / Dw::kWarpsN * Dw::kWarpM, channel_n = warp % Dw::kWarpsN * Dw::kWarpN;
  const int channel_m = warp / Dx::kWarpsN * Dx::kWarpM, pixel_n = warp % Dx::kWarpsN * Dx::kWarpN;
  const PlaneFragments dz_rows(PlaneFragments::Use::kA, lane),
      x_rows(PlaneFragments::Use::kB, lane);
  const PlaneFragments dz_columns(PlaneFragments::Use::kTurnedB, lane);
  const FilterFragments w(filters, d.filters, lane, channel_m);
  const int steps = (d.filters + 15) / 16;
  constexpr int kChain = kChainPixels / kRowPixels;

  Sums<Dw> sums;
  sums.clear();
  int number = 0;
  run_pipeline<kStages>(tiles, load, [&](int stage, auto&& meanwhile) {
    const SharedAddress dz = staged + static_cast<SharedAddress>(stage * Tiles::kStageBytes);
    const SharedAddress x = dz + Dw::kM * kRowBytes;
#pragma unroll
    for (int i = 0; i < kRowPixels / 16; ++i)
      multiply_step<T>(
          sums,
          [&](auto& word, int m) { load_matrices(word, dz_rows.at(dz, filter_m / 16 + m, i)); },
          [&](auto& word, int n) {
            load_matrices(word, x_rows.at(x, channel_n / 16 + n, i));
            if (i == 0 && n == Dw::kGroupsN - 1) meanwhile();
          });
    if (wants_dx) {
      Sums<Dx> of_pixels;
      of_pixels.clear();
#pragma unroll 2
      for (int i = 0; i < steps; ++i)
        multiply_step<T>(
            of_pixels, [&](auto& word, int m) { w.load(word, i, m); },
            [&](auto& word, int n) {
              load_matrices_transposed(word, dz_columns.at(dz, i, pixel_n / 16 + n));
            });
      const int64_t first_pixel = (int64_t{number} * step + part) * kRowPixels + pixel_n;
      store_planes<T>(
          of_pixels, to_dx, plane, lane,
          [&](int i) { return channel_m + i < d.channels ? channel_m + i : -1; },
          [&](int eight) -> int64_t {
            const int64_t pixel = first_pixel + 8 * eight;
            if (pixel >= d.pixels) return -1;
            uint32_t sample = static_cast<uint32_t>(pixel);
            const uint32_t in_plane = d.plane.split(sample);
            return sample * (d.channels * plane) + in_plane;
          });
    }
    if (++number % kChain == 0 || number == tiles) {
      add_to_part(d, sums, part, lane, filter_m, channel_n, number <= kChain);
      sums.clear();
    }
  });
}

// For many filters and few channels, or the other way round.
using ManyFilters = GradientTiles<Tile<256, 64, 8, 1, 1, 4>, Tile<64, 64, 4, 2, 1>>;
using ManyChannels = GradientTiles<Tile<64, 256, 2, 4, 1, 4>, Tile<256, 64, 8, 1, 1>>;

template <typename T>
void run_planes_gradients(PlanesGradients p, const Epilogue<T>& to_dx, const Queue& queue) {
  WgradProblem& d = p.dw;
  // Tests on the emulator see parts of more than one chain of sums.
#ifdef TORCHCONV_EMULATE_CUDA
  constexpr int64_t kMultiprocessors = 3;
#else
  constexpr int64_t kMultiprocessors = 132;
#endif
  constexpr int64_t kFewestTiles = 4;
  const int64_t tiles = ceil_div(d.pixels, kRowPixels);
  d.tiles_m = d.tiles_n = 1;
  d.parts = static_cast<uint32_t>(std::min(kMultiprocessors, ceil_div(tiles, kFewestTiles)));
  d.pitch = static_cast<int32_t>(round_up(d.weights, 2));
  d.sums = queue.scratch<float>(int64_t{d.parts} * d.filters * d.pitch);
  const auto run = [&](auto chosen) {
    using Tiles = decltype(chosen);
    launch(mma_planes_gradients_kernel<T, Tiles>, dim3(d.parts), dim3(Tiles::Dw::kThreads),
           Tiles::shared_bytes(d.filters), queue, p, to_dx);
  };
  if (d.channels <= 64)
    run(ManyFilters{});
  else
    run(ManyChannels{});
  launch_add_parts<T>(d, queue);
}

}  // namespace torchconv::cuda
