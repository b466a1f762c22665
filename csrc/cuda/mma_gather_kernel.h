// The kernel of mma_gather.h, for the files that instantiate it for one type each.
#pragma once

#include <algorithm>

#include "core/range.h"
#include "cuda/mma_epilogue.h"
#include "cuda/mma_gather.h"

namespace torchconv::cuda {

// What an axis is in one phase: tap j is tap first_tap + j * tap_step of the filter and moves j *
// move in the image, output i is first_output + i * output_step and stands at i * scale + base.
struct AxisPhase {
  int first_tap, tap_step, taps, move;
  int scale, base;
  int outputs, first_output, output_step;
};

__host__ __device__ __forceinline__ AxisPhase phase_of(const MmaAxis& axis, bool backward,
                                                       int phase) {
  if (!backward)
    return {0, 1, axis.taps, axis.dilation, axis.stride, -axis.pad, axis.outputs, 0, 1};
  // dx at h = phase + i * stride gets dz at (h + pad - r * dilation) / stride where that is whole.
  const int step = axis.stride / axis.common;
  int first = 0;
  while (first < axis.taps && first < step &&
         (phase + axis.pad - first * axis.dilation) % axis.stride != 0)
    ++first;
  const bool any = first < axis.taps && first < step;
  AxisPhase a;
  a.first_tap = first;
  a.tap_step = step;
  a.taps = any ? (axis.taps - 1 - first) / step + 1 : 0;
  a.move = -(axis.dilation / axis.common);
  a.scale = 1;
  a.base = (phase + axis.pad - first * axis.dilation) / axis.stride;
  a.outputs = (axis.outputs - 1 - phase) / axis.stride + 1;
  a.first_output = phase;
  a.output_step = axis.stride;
  return a;
}

template <typename Tile>
inline constexpr int kGatherShared =
    kTileBytes<Tile> + Tile::kM * static_cast<int>(sizeof(Place) + sizeof(int64_t));

// Bias, residual, pre-activation, activation and rounding of a tile of finished sums in shared
// memory. offsets: of the rows' outputs, negative for a row that is none. thread: of
// the tile's.
template <typename T, typename Tile>
__device__ __forceinline__ void store_tile(int thread, const float* sums, const int64_t* offsets,
                                           int first_column, int columns, bool vectors,
                                           const Epilogue<T>& epilogue) {
  constexpr int kLane = kLanes<T>, kUnits = Tile::kN / kLane;
  const int local = thread % kUnits * kLane, column = first_column + local;
  if (column >= columns) return;
  float bias[kLane];
#pragma unroll
  for (int e = 0; e < kLane; ++e)
    bias[e] = column + e < columns ? epilogue.bias_of(column + e) : 0.0f;
  for (int row = thread / kUnits; row < Tile::kM; row += Tile::kThreads / kUnits) {
    if (offsets[row] < 0) continue;
    const int64_t offset = offsets[row] + column;
    float z[kLane];
    load_sums(z, sums + row * kSumsPitch<Tile> + local);
#pragma unroll
    for (int e = 0; e < kLane; ++e) z[e] += bias[e];
    const auto load = [&](const T* from) {
      if (vectors) return *reinterpret_cast<const Vector<T, kLane>*>(from + offset);
      Vector<T, kLane> read{};
#pragma unroll
      for (int e = 0; e < kLane; ++e)
        if (column + e < columns) read.element[e] = from[offset + e];
      return read;
    };
    finish(z, epilogue, load, [&](T* to, const Vector<T, kLane>& rounded) {
      if (vectors) {
        *reinterpret_cast<Vector<T, kLane>*>(to + offset) = rounded;
      } else {
#pragma unroll
        for (int e = 0; e < kLane; ++e)
          if (column + e < columns) to[offset + e] = rounded.element[e];
      }
    });
  }
}

template <typename T, typename Tile, bool Vectors>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    mma_gather_kernel(const __grid_constant__ GatherProblem p, const Epilogue<T> epilogue) {
  using U = Unit<T, Vectors>;
  constexpr int kUnits = kSliceBytes / U::kBytes, kPass = Tile::kThreads / kUnits;
  constexpr int64_t kElement = sizeof(T);
  unsigned char* shared = dynamic_shared<unsigned char>();
  Place* places = reinterpret_cast<Place*>(shared + kTileBytes<Tile>);
  int64_t* offsets = reinterpret_cast<int64_t*>(places + Tile::kM);

  // Groups that are neighbours read the same lines of memory.
  const uint32_t tile_n = blockIdx.x % p.tiles_n, of_group = blockIdx.x / p.tiles_n;
  const int group = static_cast<int>(of_group % static_cast<uint32_t>(p.groups));
  const uint32_t rest = of_group / static_cast<uint32_t>(p.groups);
  const uint32_t tile_m = rest % p.tiles_m;
  const int phase = static_cast<int>(rest / p.tiles_m);
  const AxisPhase h = phase_of(p.h, p.backward, phase / p.w.phases);
  const AxisPhase w = phase_of(p.w, p.backward, phase % p.w.phases);
  const int64_t plane = int64_t{h.outputs} * w.outputs, rows = p.batch * plane;
  const int64_t first_pixel = int64_t{tile_m} * Tile::kM;
  if (first_pixel >= rows) return;
  const int first_column = static_cast<int>(tile_n) * Tile::kN;
  const int64_t pixel_bytes = int64_t{p.groups} * p.channels * kElement;
  const uint64_t image =
      reinterpret_cast<uint64_t>(p.image) + static_cast<uint64_t>(group * p.channels * kElement);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  for (int row = thread; row < Tile::kM; row += Tile::kThreads) {
    const int64_t pixel = first_pixel + row;
    Place place{0, kNowhere, kNowhere};
    int64_t offset = -1;
    if (pixel < rows) {
      const int64_t n = pixel / plane;
      const int in_plane = static_cast<int>(pixel - n * plane);
      const int i = in_plane / w.outputs, j = in_plane - i * w.outputs;
      place.h = i * h.scale + h.base, place.w = j * w.scale + w.base;
      place.address =
          image +
          static_cast<uint64_t>(((n * p.h.source + place.h) * p.w.source + place.w) * pixel_bytes);
      const int64_t output_h = h.first_output + i * h.output_step;
      const int64_t output_w = w.first_output + j * w.output_step;
      offset =
          (((n * p.h.outputs + output_h) * p.w.outputs + output_w) * p.groups + group) * p.outputs;
    }
    places[row] = place;
    offsets[row] = offset;
  }
  __syncthreads();

  const int reduction = h.taps * w.taps * p.channels;
  const Divisor taps_w = w.taps == p.least_taps ? p.few_taps : p.more_taps;
  // Bytes that a tap of the phase moves, and those from one row of filters that a thread stages to
  // the next.
  const int64_t image_column = pixel_bytes * w.move;
  const int64_t image_line = pixel_bytes * p.w.source * h.move;
  const int64_t filter_column = p.filter_column * kElement * w.tap_step;
  const int64_t filter_line = p.filter_line * kElement * h.tap_step;
  const int64_t filter_rows = p.filter_pitch * kElement * kPass;
  const int unit = thread % kUnits, first_row = thread / kUnits;
  const int first_filter = first_column + first_row;
  const uint64_t filters =
      reinterpret_cast<uint64_t>(p.filters) +
      static_cast<uint64_t>(kElement *
                            (group * p.filter_group + h.first_tap * p.filter_line +
                             w.first_tap * p.filter_column + first_filter * p.filter_pitch));
  const SharedAddress staged = shared_address(shared);
  const int place_of_unit = place_in_rows(first_row, unit * U::kBytes);

  const auto load = [&](int slice, int stage) {
    bool inside[U::kAddresses];
    int move_h[U::kAddresses], move_w[U::kAddresses];
    uint64_t in_image[U::kAddresses], in_filter[U::kAddresses];
#pragma unroll
    for (int e = 0; e < U::kAddresses; ++e) {
      uint32_t j = static_cast<uint32_t>(slice * kSlice<T> + unit * U::kElements + e);
      inside[e] = j < static_cast<uint32_t>(reduction);
      const int64_t c = p.channel_divisor.split(j);
      const int s = static_cast<int>(taps_w.split(j)), r = static_cast<int>(j);
      move_h[e] = r * h.move, move_w[e] = s * w.move;
      in_image[e] = static_cast<uint64_t>(r * image_line + s * image_column + c * kElement);
      in_filter[e] =
          filters + static_cast<uint64_t>(r * filter_line + s * filter_column + c * kElement);
    }
    const SharedAddress staged_a =
        staged + static_cast<SharedAddress>(stage * Tile::kStageBytes + place_of_unit);
    const SharedAddress staged_b = staged_a + Tile::kM * kSliceBytes;
    const auto next_rows = [&](SharedAddress first, int i) {
      return first + static_cast<SharedAddress>(i * kPass * kSliceBytes);
    };
    stage_units<T, Vectors, Tile::kM / kPass>(
        [&](int i, int e) -> Source {
          const Place place = places[first_row + i * kPass];
          return {place.address + in_image[e],
                  all_of(inside[e], within(place.h + move_h[e], p.h.source),
                         within(place.w + move_w[e], p.w.source))};
        },
        [&](int i) { return next_rows(staged_a, i); });
    stage_units<T, Vectors, Tile::kN / kPass>(
        [&](int i, int e) -> Source {
          return {in_filter[e] + static_cast<uint64_t>(i * filter_rows),
                  all_of(inside[e], first_filter + i * kPass < p.outputs)};
        },
        [&](int i) { return next_rows(staged_b, i); });
  };

  const int corner_m = warp / Tile::kWarpsN * Tile::kWarpM;
  const int corner_n = warp % Tile::kWarpsN * Tile::kWarpN;
  const Fragments<T, false, Tile::kM, Tile::kGroupsM, true> a(lane, corner_m);
  const Fragments<T, false, Tile::kN, Tile::kGroupsN, false> b(lane, corner_n);
  Sums<Tile> sums;
  sums.clear();
  const int slices = (reduction + kSlice<T> - 1) / kSlice<T>;
  run_pipeline<Tile::kStages>(slices, load, [&](int stage, auto&& meanwhile) {
    const SharedAddress at = staged + static_cast<SharedAddress>(stage * Tile::kStageBytes);
    multiply_slice<T>(sums, a, at, b, at + Tile::kM * kSliceBytes, meanwhile);
  });

  float* tile = reinterpret_cast<float*>(shared);
  leave_sums(sums, tile, lane, corner_m, corner_n);
  __syncthreads();
  Epilogue<T> of_outputs = epilogue;
  if (of_outputs.bias != nullptr) of_outputs.bias += int64_t{group} * p.outputs;
  store_tile<T, Tile>(thread, tile, offsets, first_column, p.outputs, p.vector_outputs, of_outputs);
}

template <typename T, typename Tile, bool Vectors>
void launch_gather(GatherProblem p, const Epilogue<T>& epilogue, const Queue& queue) {
  const auto most = [](const MmaAxis& axis) { return ceil_div(axis.outputs, axis.phases); };
  p.tiles_m = static_cast<uint32_t>(ceil_div(p.batch * most(p.h) * most(p.w), Tile::kM));
  p.tiles_n = static_cast<uint32_t>(ceil_div(p.outputs, Tile::kN));
  launch(mma_gather_kernel<T, Tile, Vectors>,
         dim3(static_cast<unsigned>(p.h.phases * p.w.phases) * p.tiles_m * p.tiles_n *
              static_cast<unsigned>(p.groups)),
         dim3(Tile::kThreads), kGatherShared<Tile>, queue, p, epilogue);
}

// Four tiles: 64 x 64 sums a warp reuse the most of what they load; few outputs, or few pixels for
// the device, want less, and then more slices on their way. The narrowest is for groups.
template <typename T>
void run_gather(GatherProblem p, const Epilogue<T>& epilogue, const Queue& queue) {
  using Large = Tile<128, 128, 2, 2, 2>;
  using Narrow = Tile<128, 64, 2, 2, 3>;
  using Small = Tile<64, 64, 2, 2, 3, 8>;
  using Elements = Tile<64, 64, 2, 2, 4>;
  if (!p.vectors) return launch_gather<T, Elements, false>(p, epilogue, queue);
  if constexpr (sizeof(T) == 2) {
    using Slim = Tile<128, 32, 4, 1, 4, 5>;
    if (p.groups > 1 && p.outputs <= 32) return launch_gather<T, Slim, true>(p, epilogue, queue);
  }
  // Turns of the device's multiprocessors, times the sums of a turn, by what each tile reaches.
  const auto cost = [&](int64_t m, int64_t n, double efficiency) {
    const int64_t pixels = p.batch * p.h.outputs * p.w.outputs;
    const int64_t turns = ceil_div(p.groups * ceil_div(pixels, m) * ceil_div(p.outputs, n),
                                   std::max(queue.multiprocessors, 1));
    return static_cast<double>(turns * m * n) / efficiency;
  };
  const double large = cost(128, 128, 1.0), narrow = cost(128, 64, 0.85), small = cost(64, 64, 0.6);
  if (large <= narrow && large <= small)
    launch_gather<T, Large, true>(p, epilogue, queue);
  else if (narrow <= small)
    launch_gather<T, Narrow, true>(p, epilogue, queue);
  else
    launch_gather<T, Small, true>(p, epilogue, queue);
}

}  // namespace torchconv::cuda
