// The kernels of mma_wgrad.h, for the files that instantiate them for one type each.
#pragma once

#include <algorithm>

#include "core/range.h"
#include "cuda/mma_wgrad.h"

namespace torchconv::cuda {

inline constexpr int kChainPixels = 2048;

// A warp's sums into those of its part, the first of a part or more of them.
template <typename Tile>
__device__ __forceinline__ void add_to_part(const WgradProblem& p, const Sums<Tile>& sums,
                                            int64_t part, int lane, int first_filter,
                                            int first_weight, bool first) {
  float* to = p.sums + part * p.filters * p.pitch;
  sums.for_each_pair(lane, [&](int row, int column, float one, float other) {
    const int k = first_filter + row, j = first_weight + column;
    if (k >= p.filters || j >= p.pitch) return;
    auto* pair = reinterpret_cast<Vector<float, 2>*>(to + (int64_t{k} * p.pitch + j));
    Vector<float, 2> sum{{one, other}};
    if (!first) {
      const Vector<float, 2> before = *pair;
      sum.element[0] += before.element[0], sum.element[1] += before.element[1];
    }
    *pair = sum;
  });
}

template <typename T, typename Tile, bool VectorsDz, bool VectorsX>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    mma_wgrad_kernel(const __grid_constant__ WgradProblem p) {
  using Dz = Unit<T, VectorsDz>;
  using X = Unit<T, VectorsX>;
  constexpr int kElement = static_cast<int>(sizeof(T)), kRows = kSlice<T>;
  constexpr int kUnitsDz = Tile::kM / Dz::kElements, kPassDz = Tile::kThreads / kUnitsDz;
  constexpr int kUnitsX = Tile::kN / X::kElements, kPassX = Tile::kThreads / kUnitsX;
  __shared__ Place places[2][kRows];

  const uint32_t tile_n = blockIdx.x % p.tiles_n, rest = blockIdx.x / p.tiles_n;
  const uint32_t tile_m = rest % p.tiles_m;
  const int64_t part = rest / p.tiles_m;
  const int first_filter = static_cast<int>(tile_m) * Tile::kM;
  const int first_weight = static_cast<int>(tile_n) * Tile::kN;
  const int64_t first_pixel = part * p.part_pixels;
  const int count = static_cast<int>(min(p.part_pixels, p.pixels - first_pixel));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  // The part's first pixel: its sample, and where it is in the plane.
  const int64_t first_sample = first_pixel / p.plane.value();
  const uint32_t first_in_plane =
      static_cast<uint32_t>(first_pixel - first_sample * p.plane.value());
  const auto find_places = [&](int slice) {
    if (thread >= kRows) return;
    const int local = slice * kRows + thread;
    Place place{0, kNowhere, kNowhere};
    if (local < count) {
      uint32_t sample = first_in_plane + static_cast<uint32_t>(local);
      uint32_t row = p.plane.split(sample);
      const uint32_t column = p.line.split(row);
      place.h = static_cast<int>(row) * p.stride_h - p.pad_top;
      place.w = static_cast<int>(column) * p.stride_w - p.pad_left;
      place.address =
          reinterpret_cast<uint64_t>(p.x) +
          static_cast<uint64_t>((((first_sample + sample) * p.H + place.h) * p.W + place.w) *
                                (int64_t{p.channels} * kElement));
    }
    places[slice & 1][thread] = place;
  };

  const int unit_dz = thread % kUnitsDz, row_dz = thread / kUnitsDz;
  const int unit_x = thread % kUnitsX, row_x = thread / kUnitsX;
  const int filter = first_filter + unit_dz * Dz::kElements;
  const int64_t dz_row = int64_t{p.filters} * kElement;  // bytes
  const uint64_t dz = reinterpret_cast<uint64_t>(p.dz) +
                      static_cast<uint64_t>((first_pixel + row_dz) * dz_row + filter * kElement);
  bool is_weight[X::kAddresses];
  int move_h[X::kAddresses], move_w[X::kAddresses];
  uint64_t move[X::kAddresses];
#pragma unroll
  for (int e = 0; e < X::kAddresses; ++e) {
    uint32_t j = static_cast<uint32_t>(first_weight + unit_x * X::kElements + e);
    is_weight[e] = j < static_cast<uint32_t>(p.weights);
    const uint32_t c = p.channel_divisor.split(j);
    const uint32_t s = p.tap_divisor.split(j);
    move_h[e] = static_cast<int>(j) * p.dilation_h, move_w[e] = static_cast<int>(s) * p.dilation_w;
    move[e] =
        static_cast<uint64_t>(((int64_t{move_h[e]} * p.W + move_w[e]) * p.channels + c) * kElement);
  }

  const SharedAddress staged = shared_address(dynamic_shared<unsigned char>());
  const auto load = [&](int slice, int stage) {
    const SharedAddress staged_a = staged + static_cast<SharedAddress>(stage * Tile::kStageBytes);
    const SharedAddress staged_b = staged_a + Tile::kM * kSliceBytes;
    const Place* place_of = places[slice & 1];
    const int first = slice * kRows + row_dz;
    const uint64_t dz_slice = dz + static_cast<uint64_t>(slice * kRows * dz_row);
    stage_units<T, VectorsDz, kRows / kPassDz>(
        [&](int i, int e) -> Source {
          return {dz_slice + static_cast<uint64_t>(i * kPassDz * dz_row + e * kElement),
                  all_of(first + i * kPassDz < count, filter + e < p.filters)};
        },
        [&](int i) {
          return staged_a + static_cast<SharedAddress>(place_in_columns(
                                row_dz + i * kPassDz, unit_dz * Dz::kBytes, Tile::kM * kElement));
        });
    stage_units<T, VectorsX, kRows / kPassX>(
        [&](int i, int e) -> Source {
          const Place place = place_of[row_x + i * kPassX];
          return {place.address + move[e], all_of(is_weight[e], within(place.h + move_h[e], p.H),
                                                  within(place.w + move_w[e], p.W))};
        },
        [&](int i) {
          return staged_b + static_cast<SharedAddress>(place_in_columns(
                                row_x + i * kPassX, unit_x * X::kBytes, Tile::kN * kElement));
        });
  };

  const int corner_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int corner_n = warp % Tile::kWarpsN * Tile::kWarpN;
  const Fragments<T, true, Tile::kM, Tile::kGroupsM, true> a(lane, corner_m);
  const Fragments<T, true, Tile::kN, Tile::kGroupsN, false> b(lane, corner_n);
  Sums<Tile> sums;
  sums.clear();
  const auto add = [&](bool first) {
    add_to_part(p, sums, part, lane, first_filter + corner_m, first_weight + corner_n, first);
  };
  const int slices = (count + kRows - 1) / kRows;
  constexpr int kChain = kChainPixels / kRows;

  for (int slice = 0; slice < Tile::kStages - 1; ++slice) {
    find_places(slice);
    __syncthreads();
    load(slice, slice);
    copy_async_commit();
  }
  find_places(Tile::kStages - 1);
  for (int slice = 0; slice < slices; ++slice) {
    copy_async_wait<Tile::kStages - 2>();
    __syncthreads();
    const int ahead = slice + Tile::kStages - 1;
    find_places(ahead + 1);
    const SharedAddress at =
        staged + static_cast<SharedAddress>(slice % Tile::kStages * Tile::kStageBytes);
    multiply_slice<T>(sums, a, at, b, at + Tile::kM * kSliceBytes, [&] {
      load(ahead, ahead % Tile::kStages);
      copy_async_commit();
    });
    if (slice % kChain == kChain - 1 && slice + 1 < slices) {
      add(slice < kChain);
      sums.clear();
    }
  }
  copy_async_wait<0>();
  add(slices <= kChain);
}

// dw = the sum of the parts: `Lanes` threads for each weight, every one over its share of them.
inline constexpr int kAddThreads = 256;
template <typename T, int Lanes>
__global__ void __launch_bounds__(kAddThreads) add_parts(const __grid_constant__ WgradProblem p) {
  constexpr int kColumns = kAddThreads / Lanes;
  __shared__ float sums[Lanes][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, lane = thread / kColumns;
  const int64_t size = int64_t{p.filters} * p.pitch;
  const int64_t i = int64_t{blockIdx.x} * kColumns + column;
  float sum = 0.0f;
  if (i < size)
    for (uint32_t part = static_cast<uint32_t>(lane); part < p.parts; part += Lanes)
      sum += p.sums[part * size + i];
  sums[lane][column] = sum;
  __syncthreads();
  if (lane != 0 || i >= size) return;
  for (int other = 1; other < Lanes; ++other) sum += sums[other][column];
  const int64_t k = i / p.pitch, j = i - k * p.pitch;
  if (j < p.weights) static_cast<T*>(p.dw)[k * p.weights + j] = from_wide<T>(sum);
}

template <typename T, typename Tile, bool VectorsDz, bool VectorsX>
void launch_wgrad(const WgradProblem& p, const Queue& queue) {
  launch(mma_wgrad_kernel<T, Tile, VectorsDz, VectorsX>, dim3(p.parts * p.tiles_m * p.tiles_n),
         dim3(Tile::kThreads), Tile::kStages * Tile::kStageBytes, queue, p);
}

// How many parts the pixels are cut into: blocks that fill `slots` at once a whole number of times,
// but parts that are not too short to be worth their sums.
inline int64_t choose_parts(int64_t pixels, int64_t tiles, int64_t slots) {
  constexpr int64_t kLeastPixels = 512, kMostPixels = int64_t{1} << 24, kOverhead = 256;
  const int64_t least = ceil_div(pixels, kMostPixels), most = ceil_div(pixels, kLeastPixels);
  int64_t best = least, best_cost = 0;
  for (int64_t turns = 1; turns <= 4; ++turns) {
    const int64_t parts = std::max(std::min(turns * slots / tiles, most), least);
    const int64_t cost = ceil_div(parts * tiles, slots) * (ceil_div(pixels, parts) + kOverhead);
    if (turns == 1 || cost < best_cost) best = parts, best_cost = cost;
  }
  return best;
}

inline void set_tiles(WgradProblem& p, int64_t m, int64_t n) {
  p.tiles_m = static_cast<uint32_t>(ceil_div(p.filters, m));
  p.tiles_n = static_cast<uint32_t>(ceil_div(p.weights, n));
}

// The parts, for tiles of m x n, and the memory of their sums.
template <typename T>
void set_parts(WgradProblem& p, int64_t m, int64_t n, const Queue& queue) {
  set_tiles(p, m, n);
  const int64_t parts =
      choose_parts(p.pixels, int64_t{p.tiles_m} * p.tiles_n, 132 * (m == 128 ? 2 : 3));
  p.part_pixels = round_up(ceil_div(p.pixels, parts), kSlice<T>);
  p.parts = static_cast<uint32_t>(ceil_div(p.pixels, p.part_pixels));
  p.pitch = static_cast<int32_t>(round_up(p.weights, 2));
  p.sums = queue.scratch<float>(int64_t{p.parts} * p.filters * p.pitch);
}

template <typename T>
void launch_add_parts(const WgradProblem& p, const Queue& queue) {
  const int64_t size = int64_t{p.filters} * p.pitch;
  const auto add = [&](auto kernel, int lanes) {
    launch(kernel, dim3(static_cast<unsigned>(ceil_div(size, kAddThreads / lanes))),
           dim3(kAddThreads), 0, queue, p);
  };
  if (p.parts > 8)
    add(add_parts<T, 8>, 8);
  else
    add(add_parts<T, 1>, 1);
}

// Tiles by the shape alone, not by what can be loaded at once or the device: the parts, and so the
// bits, follow them. The slots are those of a Hopper GPU.
using LargeWgrad = Tile<128, 128, 2, 2, 2>;
using FlatWgrad = Tile<64, 128, 2, 2, 3>;
using SmallWgrad = Tile<64, 64, 2, 2, 3, 8>;
inline int64_t wgrad_tile_m(const WgradProblem& p) {
  return p.filters > 64 && p.weights > 64 ? 128 : 64;
}
inline int64_t wgrad_tile_n(const WgradProblem& p) { return p.weights > 64 ? 128 : 64; }

template <typename T>
void run_wgrad(WgradProblem p, const Queue& queue) {
  using Elements = Tile<64, 64, 2, 2, 3>;
  const int64_t m = wgrad_tile_m(p), n = wgrad_tile_n(p);
  set_parts<T>(p, m, n, queue);
  if (!p.vectors_x) {
    set_tiles(p, 64, 64);
    if (p.vectors_dz)
      launch_wgrad<T, Elements, true, false>(p, queue);
    else
      launch_wgrad<T, Elements, false, false>(p, queue);
  } else if (!p.vectors_dz) {
    set_tiles(p, 64, 64);
    launch_wgrad<T, Elements, false, true>(p, queue);
  } else if (m == 128) {
    launch_wgrad<T, LargeWgrad, true, true>(p, queue);
  } else if (n == 128) {
    launch_wgrad<T, FlatWgrad, true, true>(p, queue);
  } else {
    launch_wgrad<T, SmallWgrad, true, true>(p, queue);
  }
  launch_add_parts<T>(p, queue);
}

}  // namespace torchconv::cuda
