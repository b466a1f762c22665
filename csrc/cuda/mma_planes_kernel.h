// The kernels of mma_planes.h, for the files that instantiate them for one type each.
#pragma once

#include "cuda/mma_epilogue.h"
#include "cuda/mma_planes.h"
#include "cuda/mma_wgrad_kernel.h"

namespace torchconv::cuda {

// Pixels of a flat index over all samples, found from the first one of a block or part.
struct PixelSplit {
  int64_t sample;
  uint32_t in_plane;

  __device__ __forceinline__ PixelSplit(int64_t pixel, const Divisor& plane)
      : sample(pixel / plane.value()),
        in_plane(static_cast<uint32_t>(pixel - sample * plane.value())) {}

  // Of the pixel `local` further on: the element in an image of `rows` planes a sample.
  __device__ __forceinline__ int64_t element(int local, const Divisor& plane, int64_t rows) const {
    uint32_t samples = in_plane + static_cast<uint32_t>(local);
    const uint32_t rest = plane.split(samples);
    return (sample + samples) * rows * plane.value() + rest;
  }
};

// Tile::kM outputs x Tile::kN pixels; Bytes are a unit's of pixels.
template <typename T, typename Tile, int Bytes>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    mma_planes_kernel(const __grid_constant__ PlanesProblem p, const Epilogue<T> epilogue) {
  constexpr int kElement = static_cast<int>(sizeof(T)), kLane = kLanes<T>, kRows = kSlice<T>;
  constexpr int kUnitsA = kSliceBytes / 16, kPassA = Tile::kThreads / kUnitsA;
  constexpr int kPixels = Bytes / kElement;  // of a unit
  constexpr int kUnitsB = Tile::kN / kPixels, kPassB = Tile::kThreads / kUnitsB;
  unsigned char* shared = dynamic_shared<unsigned char>();
  const SharedAddress staged = shared_address(shared);

  const int first_output = static_cast<int>(blockIdx.x % p.tiles_m) * Tile::kM;
  const int64_t first_pixel = int64_t{blockIdx.x / p.tiles_m} * Tile::kN;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  const int unit_a = thread % kUnitsA, row_a = thread / kUnitsA;
  const int64_t filter_bytes = int64_t{p.channels} * kElement;
  const uint64_t filters =
      reinterpret_cast<uint64_t>(p.filters) +
      static_cast<uint64_t>((first_output + row_a) * filter_bytes + unit_a * 16);
  const int place_a = place_in_rows(row_a, unit_a * 16);

  const int unit_b = thread % kUnitsB, row_b = thread / kUnitsB;
  const PixelSplit split(first_pixel, p.plane);
  const bool is_pixel = first_pixel + unit_b * kPixels < p.pixels;
  const int64_t plane_bytes = int64_t{p.plane.value()} * kElement;
  const uint64_t image =
      reinterpret_cast<uint64_t>(p.image) +
      static_cast<uint64_t>(split.element(unit_b * kPixels, p.plane, p.channels) * kElement +
                            row_b * plane_bytes);

  const auto load = [&](int slice, int stage) {
    const SharedAddress staged_a = staged + static_cast<SharedAddress>(stage * Tile::kStageBytes);
    const SharedAddress staged_b = staged_a + Tile::kM * kSliceBytes;
    const int first = slice * kRows;
    const bool inside = first + unit_a * kLane < p.channels;
    const uint64_t from_a = filters + static_cast<uint64_t>(slice * kSliceBytes);
    const uint64_t from_b = image + static_cast<uint64_t>(first * plane_bytes);
#pragma unroll
    for (int i = 0; i < Tile::kM / kPassA; ++i)
      copy_async<16>(
          staged_a + static_cast<SharedAddress>(place_a + i * kPassA * kSliceBytes),
          reinterpret_cast<const void*>(from_a + static_cast<uint64_t>(i * kPassA * filter_bytes)),
          all_of(inside, first_output + row_a + i * kPassA < p.outputs));
#pragma unroll
    for (int i = 0; i < kRows / kPassB; ++i)
      copy_async<Bytes>(
          staged_b + static_cast<SharedAddress>(
                         place_in_columns(row_b + i * kPassB, unit_b * Bytes, Tile::kN * kElement)),
          reinterpret_cast<const void*>(from_b + static_cast<uint64_t>(i * kPassB * plane_bytes)),
          all_of(is_pixel, first + row_b + i * kPassB < p.channels));
  };

  const int corner_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int corner_n = warp % Tile::kWarpsN * Tile::kWarpN;
  const Fragments<T, false, Tile::kM, Tile::kGroupsM, true> a(lane, corner_m);
  const Fragments<T, true, Tile::kN, Tile::kGroupsN, false> b(lane, corner_n);
  Sums<Tile> sums;
  sums.clear();
  run_pipeline<Tile::kStages>(
      (p.channels + kRows - 1) / kRows, load, [&](int stage, auto&& meanwhile) {
        const SharedAddress at = staged + static_cast<SharedAddress>(stage * Tile::kStageBytes);
        multiply_slice<T>(sums, a, at, b, at + Tile::kM * kSliceBytes, meanwhile);
      });

  float* tile = reinterpret_cast<float*>(shared);
  leave_sums(sums, tile, lane, corner_m, corner_n);
  __syncthreads();
  if (!is_pixel) return;
  const int64_t to_unit = split.element(unit_b * kPixels, p.plane, p.outputs);
  for (int row = row_b; row < Tile::kM && first_output + row < p.outputs; row += kPassB) {
    const int64_t offset = to_unit + int64_t{first_output + row} * p.plane.value();
    const float bias = epilogue.bias_of(first_output + row);
    float z[kPixels];
    load_sums(z, tile + row * kSumsPitch<Tile> + unit_b * kPixels);
#pragma unroll
    for (int e = 0; e < kPixels; ++e) z[e] += bias;
    const auto load = [&](const T* from) {
      if (p.vector_outputs) return *reinterpret_cast<const Vector<T, kPixels>*>(from + offset);
      Vector<T, kPixels> read{};
#pragma unroll
      for (int e = 0; e < kPixels; ++e) read.element[e] = from[offset + e];
      return read;
    };
    finish(z, epilogue, load, [&](T* to, const Vector<T, kPixels>& rounded) {
      if (p.vector_outputs) {
        *reinterpret_cast<Vector<T, kPixels>*>(to + offset) = rounded;
      } else {
#pragma unroll
        for (int e = 0; e < kPixels; ++e) to[offset + e] = rounded.element[e];
      }
    });
  }
}

// Tile::kM filters x Tile::kN channels over one part of the pixels.
template <typename T, typename Tile, int Bytes>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    mma_planes_wgrad_kernel(const __grid_constant__ WgradProblem p) {
  constexpr int kElement = static_cast<int>(sizeof(T)), kPixels = Bytes / kElement;
  constexpr int kUnits = kSliceBytes / Bytes, kPass = Tile::kThreads / kUnits;

  const uint32_t tile_n = blockIdx.x % p.tiles_n, rest = blockIdx.x / p.tiles_n;
  const int first_filter = static_cast<int>(rest % p.tiles_m) * Tile::kM;
  const int first_channel = static_cast<int>(tile_n) * Tile::kN;
  const int64_t part = rest / p.tiles_m, first_pixel = part * p.part_pixels;
  const int count = static_cast<int>(min(p.part_pixels, p.pixels - first_pixel));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;

  const int unit = thread % kUnits, first_row = thread / kUnits;
  const PixelSplit split(first_pixel, p.plane);
  const int64_t pass_bytes = int64_t{kPass} * p.plane.value() * kElement;
  const auto rows_from = [&](const void* image, int row) {
    return reinterpret_cast<uint64_t>(image) +
           static_cast<uint64_t>(int64_t{row} * p.plane.value() * kElement);
  };
  const uint64_t dz = rows_from(p.dz, first_filter + first_row);
  const uint64_t x = rows_from(p.x, first_channel + first_row);
  const SharedAddress staged = shared_address(dynamic_shared<unsigned char>());
  const int place = place_in_rows(first_row, unit * Bytes);

  const auto load = [&](int slice, int stage) {
    const int local = slice * kSlice<T> + unit * kPixels;
    const bool inside = local < count;
    const SharedAddress staged_a =
        staged + static_cast<SharedAddress>(stage * Tile::kStageBytes + place);
    const auto stage_rows = [&](auto extent, SharedAddress to, uint64_t from, int row, int rows) {
#pragma unroll
      for (int i = 0; i < decltype(extent)::value / kPass; ++i)
        copy_async<Bytes>(
            to + static_cast<SharedAddress>(i * kPass * kSliceBytes),
            reinterpret_cast<const void*>(from + static_cast<uint64_t>(i * pass_bytes)),
            all_of(inside, row + i * kPass < rows));
    };
    stage_rows(std::integral_constant<int, Tile::kM>{}, staged_a,
               dz + static_cast<uint64_t>(split.element(local, p.plane, p.filters) * kElement),
               first_filter + first_row, p.filters);
    stage_rows(std::integral_constant<int, Tile::kN>{}, staged_a + Tile::kM * kSliceBytes,
               x + static_cast<uint64_t>(split.element(local, p.plane, p.channels) * kElement),
               first_channel + first_row, p.channels);
  };

  const int corner_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int corner_n = warp % Tile::kWarpsN * Tile::kWarpN;
  const Fragments<T, false, Tile::kM, Tile::kGroupsM, true> a(lane, corner_m);
  const Fragments<T, false, Tile::kN, Tile::kGroupsN, false> b(lane, corner_n);
  Sums<Tile> sums;
  sums.clear();
  const int slices = (count + kSlice<T> - 1) / kSlice<T>;
  constexpr int kChain = kChainPixels / kSlice<T>;
  int slice = 0;
  run_pipeline<Tile::kStages>(slices, load, [&](int stage, auto&& meanwhile) {
    const SharedAddress at = staged + static_cast<SharedAddress>(stage * Tile::kStageBytes);
    multiply_slice<T>(sums, a, at, b, at + Tile::kM * kSliceBytes, meanwhile);
    if (++slice % kChain == 0 || slice == slices) {
      add_to_part(p, sums, part, lane, first_filter + corner_m, first_channel + corner_n,
                  slice <= kChain);
      sums.clear();
    }
  });
}

template <typename T, int Bytes>
void launch_planes(PlanesProblem p, const Epilogue<T>& epilogue, const Queue& queue) {
  const auto run = [&](auto tile) {
    using Chosen = decltype(tile);
    p.tiles_m = static_cast<uint32_t>(ceil_div(p.outputs, Chosen::kM));
    p.tiles_n = static_cast<uint32_t>(ceil_div(p.pixels, Chosen::kN));
    launch(mma_planes_kernel<T, Chosen, Bytes>, dim3(p.tiles_m * p.tiles_n), dim3(Chosen::kThreads),
           kTileBytes<Chosen>, queue, p, epilogue);
  };
  if (p.outputs > 64)
    run(Tile<128, 128, 2, 2, 2>{});
  else
    run(Tile<64, 128, 2, 2, 3>{});
}

// f(the bytes of a unit of pixels): 16 where planes are multiples of them, otherwise 8.
template <typename T, typename F>
void with_unit(const Divisor& plane, F&& f) {
  if constexpr (sizeof(T) == 2)
    if (plane.value() % kLanes<T> != 0) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, 16>{});
}

template <typename T>
void run_planes(PlanesProblem p, const Epilogue<T>& epilogue, const Queue& queue) {
  with_unit<T>(p.plane,
               [&](auto bytes) { launch_planes<T, decltype(bytes)::value>(p, epilogue, queue); });
}

template <typename T>
void run_planes_wgrad(WgradProblem p, const Queue& queue) {
  const int64_t m = wgrad_tile_m(p), n = wgrad_tile_n(p);
  set_parts<T>(p, m, n, queue);
  with_unit<T>(p.plane, [&](auto bytes) {
    const auto run = [&](auto tile) {
      using Chosen = decltype(tile);
      launch(mma_planes_wgrad_kernel<T, Chosen, decltype(bytes)::value>,
             dim3(p.parts * p.tiles_m * p.tiles_n), dim3(Chosen::kThreads),
             Chosen::kStages * Chosen::kStageBytes, queue, p);
    };
    if (m == 128)
      run(LargeWgrad{});
    else if (n == 128)
      run(FlatWgrad{});
    else
      run(SmallWgrad{});
  });
  launch_add_parts<T>(p, queue);
}

}  // namespace torchconv::cuda
