// The kernel of mma_planes.h for filters that fit in shared memory, for the files that instantiate
// it for one type each: a block keeps the filters of its outputs there and computes tile after tile
// of pixels, 64 a warp. The slices of all its tiles follow each other through the stages, so that
// the next tile's are on their way while one is stored.
#pragma once

#include <algorithm>

#include "core/range.h"
#include "cuda/mma_planes.h"
#include "cuda/mma_planes_tile.h"

namespace torchconv::cuda {

template <typename Tile>
struct ResidentShape {
  static constexpr int kRows = 32;  // of a slice
  static constexpr int kBlockBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = Tile::kN / kRowPixels * kBlockBytes;
  static int shared_bytes(int channels) {
    return ResidentFilters::bytes<Tile::kM>(channels) + Tile::kStages * kStageBytes;
  }
};

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    mma_planes_resident_kernel(const __grid_constant__ PlanesProblem p, bool turned,
                               const Epilogue<T> epilogue) {
  using Shape = ResidentShape<Tile>;
  constexpr int kRows = Shape::kRows;
  constexpr int kUnits = Tile::kN / 8, kPass = Tile::kThreads / kUnits;
  unsigned char* filters = dynamic_shared<unsigned char>();
  const SharedAddress staged =
      shared_address(filters + ResidentFilters::bytes<Tile::kM>(p.channels));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_output = static_cast<int>(blockIdx.x % p.tiles_m) * Tile::kM;
  const int step = static_cast<int>(gridDim.x / p.tiles_m);
  const int first_tile = static_cast<int>(blockIdx.x / p.tiles_m);
  const int tiles = (static_cast<int>(p.tiles_n) - first_tile + step - 1) / step;
  const int slices = (p.channels + kRows - 1) / kRows;
  const int64_t plane = p.plane.value();

  stage_filters<T, Tile::kM, Tile::kThreads>(filters, static_cast<const T*>(p.filters), turned,
                                             first_output, p.outputs, p.channels);

  // The element of a sample's first plane at a unit of 8 pixels, or -1.
  const auto place_of = [&](int pixel, int planes) -> int64_t {
    if (pixel >= p.pixels) return -1;
    uint32_t sample = static_cast<uint32_t>(pixel);
    const uint32_t in_plane = p.plane.split(sample);
    return sample * (planes * plane) + in_plane;
  };

  const int unit = thread % kUnits, row = thread / kUnits;
  const int place =
      unit / kRowUnits * Shape::kBlockBytes + place_in_plane_rows(row, unit % kRowUnits);
  int next_tile = first_tile, next_slice = 0;
  bool is_pixel = false;
  const T* from = nullptr;
  const auto aim = [&] {
    const int64_t at = next_tile < static_cast<int>(p.tiles_n)
                           ? place_of(next_tile * Tile::kN + 8 * unit, p.channels)
                           : -1;
    is_pixel = at >= 0;
    from = static_cast<const T*>(p.image) + (is_pixel ? at + row * plane : 0);
  };
  aim();
  const auto load = [&](int, int stage) {
    const SharedAddress to =
        staged + static_cast<SharedAddress>(stage * Shape::kStageBytes + place);
    const int channel = next_slice * kRows + row;
#pragma unroll
    for (int i = 0; i < kRows / kPass; ++i) {
      const bool inside = all_of(is_pixel, channel + i * kPass < p.channels);
      copy_async<16>(to + static_cast<SharedAddress>(i * kPass * kRowBytes),
                     inside ? from + i * kPass * plane : static_cast<const T*>(p.image), inside);
    }
    from += kRows * plane;
    if (++next_slice == slices) {
      next_slice = 0;
      next_tile += step;
      aim();
    }
  };

  const int corner_m = warp / Tile::kWarpsN * Tile::kWarpM, block = warp % Tile::kWarpsN;
  const FilterFragments a(filters, p.channels, lane, corner_m);
  const PlaneFragments b(PlaneFragments::Use::kTurnedB, lane);
  Sums<Tile> sums;
  sums.clear();
  int slice = 0, tile = first_tile;
  run_pipeline<Tile::kStages>(tiles * slices, load, [&](int stage, auto&& meanwhile) {
    const SharedAddress at = staged + static_cast<SharedAddress>(stage * Shape::kStageBytes +
                                                                 block * Shape::kBlockBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply_step<T>(
          sums, [&](auto& word, int i) { a.load(word, 2 * slice + half, i); },
          [&](auto& word, int j) {
            load_matrices_transposed(word, b.at(at, half, j));
            if (half == 0 && j == Tile::kGroupsN - 1) meanwhile();
          });
    if (++slice < slices) return;
    const int first_pixel = tile * Tile::kN + block * kRowPixels;
    store_planes<T>(
        sums, epilogue, plane, lane,
        [&](int i) {
          const int k = first_output + corner_m + i;
          return k < p.outputs ? k : -1;
        },
        [&](int eight) { return place_of(first_pixel + 8 * eight, p.outputs); });
    sums.clear();
    slice = 0;
    tile += step;
  });
}

template <typename T, typename Tile>
void launch_resident(PlanesProblem p, bool turned, const Epilogue<T>& epilogue,
                     const Queue& queue) {
  p.tiles_m = static_cast<uint32_t>(ceil_div(p.outputs, Tile::kM));
  p.tiles_n = static_cast<uint32_t>(ceil_div(p.pixels, Tile::kN));
  const int64_t resident = int64_t{std::max(queue.multiprocessors, 1)} * Tile::kBlocks;
  const int64_t blocks = std::min<int64_t>(p.tiles_n, ceil_div(resident, p.tiles_m));
  launch(mma_planes_resident_kernel<T, Tile>, dim3(static_cast<unsigned>(blocks * p.tiles_m)),
         dim3(Tile::kThreads), ResidentShape<Tile>::shared_bytes(p.channels), queue, p, turned,
         epilogue);
}

using ManyOutputs = Tile<128, 64, 4, 1, 4, 4>;
using FewOutputs = Tile<64, 256, 2, 4, 2, 3>;

template <typename T>
bool run_resident(const PlanesProblem& p, bool turned, const Epilogue<T>& epilogue,
                  const Queue& queue) {
  constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 20), kMostBytes = 99 * 1024;
  if (!p.vector_outputs || p.plane.value() % 8 != 0 || p.pixels > kMostPixels) return false;
  if (turned && p.outputs % 8 != 0) return false;
  const auto run = [&](auto tile) {
    using Chosen = decltype(tile);
    if (ResidentShape<Chosen>::shared_bytes(p.channels) > kMostBytes) return false;
    launch_resident<T, Chosen>(p, turned, epilogue, queue);
    return true;
  };
  // Faster than run_planes where it was measured: of 64 outputs, and of 256 and 512.
  if (p.outputs <= 64) return run(FewOutputs{});
  return p.outputs > 128 && run(ManyOutputs{});
}

}  // namespace torchconv::cuda
