// The kernel of grouped_mma.h's forward pass and gradient by the image, for the files that
// instantiate it for one type each.
//
// The outputs of a tile are a list, phase by phase, cut into pieces of 16 * Pairs. A warp computes
// a piece x `Tiles` units of outputs at a time, always of the same units. Weights lie in shared
// memory as in the tensor, a filter a line, those of narrow groups with zeros in the place of their
// unit's other channels: ldmatrix makes mma's B of them, and turns it backward. Outputs are
// gathered in shared memory, so that whole lines of memory are written, and find the residual
// there.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/grouped_mma_tile.h"

namespace torchconv::cuda {

inline constexpr int kGatherWarps = 8, kGroupedThreads = 32 * kGatherWarps;
template <int Tiles>
inline constexpr int kGroupedBlocks = Tiles == 1 ? 3 : 2;

// A half of a phase's reduction: by how many bytes it is on from an output's pixel, and from the
// first filter of the outputs' group.
struct alignas(8) StagedHalf {
  int32_t pixel, filter;
};

// The piece of a warp in one round: there and back, because phases that have few taps come first.
__host__ __device__ __forceinline__ int piece_of(int round, int warp, int abreast) {
  return round * abreast + (round % 2 == 0 ? warp : abreast - 1 - warp);
}

// The tables of outputs, of where each finds its pixel in a buffer, in bytes, and of halves; those
// of halos are grouped_mma_tile.h's.
__device__ __forceinline__ void list_outputs(const GroupedGather& p, StoredPixel* stored,
                                             uint32_t* pixels) {
  for (int i = static_cast<int>(threadIdx.x); i < p.shared.listed; i += kGroupedThreads) {
    uint32_t rest = static_cast<uint32_t>(i), image = p.by_listed.split(rest);
    const int phase_w = static_cast<int>(p.by_phases_w.split(rest));
    const int phase_h = static_cast<int>(rest);
    int in_line = static_cast<int>(p.by_phase.columns.split(image));
    int in_image = static_cast<int>(p.by_phase.rows.split(image)), n = static_cast<int>(image);
    const int row = in_image * p.along_h.output_step + phase_h;
    const int column = in_line * p.along_w.output_step + phase_w;
    stored[i] = {((n * p.h.outputs + row) * p.w.outputs + column) * p.c.channels,
                 row_column(n * p.tile.rows + row, column)};
    // What only fills up the list computes the first once more.
    if (n >= p.tile.images || row >= p.tile.rows || column >= p.tile.columns) {
      stored[i].at = kNoPixel;
      n = in_image = in_line = 0;
    }
    // Of a stride, the first output is at the beginning of the first run.
    const int from_h = in_image * p.along_h.scale + p.along_h.phase[phase_h].from;
    const int from_w = in_line + p.along_w.phase[phase_w].from;
    pixels[i] =
        static_cast<uint32_t>(((n * p.halo.h + from_h) * p.halo.pitch + from_w) * kPixelBytes);
  }
}

__device__ __forceinline__ void list_halves(const GroupedGather& p, StagedHalf* halves) {
  for (int i = static_cast<int>(threadIdx.x); i < p.shared.halves; i += kGroupedThreads) {
    uint32_t phase = static_cast<uint32_t>(i);
    const int in_phase = static_cast<int>(p.by_phase_halves.split(phase));
    const int count = p.halves[phase];
    if (count == 0) continue;
    const int phase_w = static_cast<int>(p.by_phases_w.split(phase));
    const GatherPhase h = p.along_h.phase[phase], w = p.along_w.phase[phase_w];
    const int half = min(in_phase, count - 1);  // others only fill up
    const int tap = quotient(half, p.c.by_group_units), unit = half - tap * p.c.group_units;
    const int r = tap / w.taps, s = tap - r * w.taps;
    int columns = s * p.along_w.move;
    if (p.halo.scale_w > 1) {
      uint32_t in_run = static_cast<uint32_t>(columns);
      const int run = static_cast<int>(p.halo.by_scale.split(in_run));
      columns = run * p.halo.run + static_cast<int>(in_run);
    }
    const int filter_tap =
        (h.first_tap + r * p.along_h.tap_step) * p.w.taps + w.first_tap + s * p.along_w.tap_step;
    halves[i] = {(r * p.along_h.move * p.halo.pitch + columns) * kPixelBytes + unit * kUnitBytes,
                 filter_tap * p.c.group_units * kUnitBytes +
                     unit * (p.backward ? kUnitChannels * p.filter_bytes : kUnitBytes)};
  }
}

// One sum of a narrow group, of an output's pixel and a channel of its unit.
template <typename T>
__device__ __forceinline__ float sum_of_group(const GroupedGather& p, int phase,
                                              const StagedHalf* halves, const unsigned char* pixel,
                                              const unsigned char* filters, int channel) {
  const int group_channel = channel & -p.c.group, pitch = p.filter_bytes;
  const auto element = [](const unsigned char* unit, int i) {
    return to_wide(reinterpret_cast<const T*>(unit)[i]);
  };
  float sum = 0.0f;
#pragma unroll 1
  for (int half = 0; half < p.halves[phase]; ++half) {
    const StagedHalf at = halves[phase * p.phase_halves + half];
#pragma unroll 1
    for (int c = group_channel; c < group_channel + p.c.group; ++c) {
      const int line = p.backward ? c : channel, column = p.backward ? channel : c;
      sum = fmaf(element(pixel + at.pixel, c), element(filters + line * pitch + at.filter, column),
                 sum);
    }
  }
  return sum;
}

// Where a lane finds mma's B.
struct OwnFilters {
  const StagedHalf* halves;
  SharedAddress first;
  SharedAddress to_next;  // bytes from a unit of outputs to the next but one
  bool turned;
};

// The halves of one phase. halves: those that the lane addresses of A.
template <typename T, int Pairs, int Tiles>
__device__ __forceinline__ void accumulate(float (&sums)[Pairs][Tiles][4],
                                           const SharedAddress (&pixel)[Pairs],
                                           const StagedHalf* halves, OwnFilters filters,
                                           int count) {
  // A step's products, of one half where the other only fills up: zeros would make NaN of infinity.
  const auto multiply = [&](const uint32_t (*b)[2], bool both) {
    const SharedAddress half = static_cast<SharedAddress>(halves->pixel);
#pragma unroll
    for (int m = 0; m < Pairs; ++m) {
      uint32_t a[4];
      load_matrices(a, pixel[m] + half);
      if (!both) a[2] = a[3] = 0;
#pragma unroll
      for (int n = 0; n < Tiles; ++n) mma<T>(sums[m][n], a, b[n][0], both ? b[n][1] : 0);
    }
    halves += 2;
  };
  if constexpr (Tiles == 1) {
    // Four matrices of B are two steps.
    const auto load = [&](uint32_t (&b)[2][1][2]) {
      uint32_t word[4];
      load_matrices(word, filters.first + static_cast<SharedAddress>(filters.halves->filter),
                    filters.turned);
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i / 2][0][i % 2] = word[i];
      filters.halves += 4;
    };
    uint32_t b[2][1][2];
#pragma unroll 1
    for (; count >= 4; count -= 4) {
      load(b);
      multiply(b[0], true);
      multiply(b[1], true);
    }
    if (count == 0) return;
    load(b);
    multiply(b[0], count > 1);
    if (count == 3) multiply(b[1], false);
  } else {
    const auto load_and_multiply = [&](bool both) {
      const SharedAddress first =
          filters.first + static_cast<SharedAddress>(filters.halves->filter);
      uint32_t b[Tiles][2];
#pragma unroll
      for (int n = 0; n < Tiles; n += 2) {
        uint32_t word[4];
        load_matrices(word, first + static_cast<SharedAddress>(n / 2) * filters.to_next,
                      filters.turned);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[n + i / 2][i % 2] = word[i];
      }
      filters.halves += 2;
      multiply(b, both);
    };
#pragma unroll(Tiles == 2 ? 2 : 1)
    for (; count >= 2; count -= 2) load_and_multiply(true);
    if (count == 1) load_and_multiply(false);
  }
}

template <typename T, int Pairs, int Tiles>
__global__ void __launch_bounds__(kGroupedThreads, kGroupedBlocks<Tiles>)
    grouped_gather_kernel(const __grid_constant__ GroupedGather p, const Epilogue<T> epilogue) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int part = static_cast<int>(blockIdx.y);
  const int first_unit = static_cast<int>(blockIdx.x) * p.c.slab_units;
  const int units = min(p.c.slab_units, p.c.channels / kUnitChannels - first_unit);
  const int begin = first_tile_of(p.tiles, part), end = first_tile_of(p.tiles, part + 1);

  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* out = shared + p.shared.out_at;
  unsigned char* filters = shared + p.shared.filters_at;
  StagedPixel* staged = reinterpret_cast<StagedPixel*>(shared + p.shared.staged_at);
  StoredPixel* stored = reinterpret_cast<StoredPixel*>(shared + p.shared.stored_at);
  StagedHalf* halves = reinterpret_cast<StagedHalf*>(shared + p.shared.halves_at);
  uint32_t* listed = reinterpret_cast<uint32_t*>(shared + p.shared.listed_at);
  const auto buffer = [&](int tile) {
    return shared_address(shared) +
           static_cast<SharedAddress>((tile & 1 & (p.buffers - 1)) * p.shared.buffer_bytes);
  };
  const Plane source{p.h.source, p.w.source};
  const auto stage = [&](int tile, const TilePlace& at) {
    const int image = at.image * p.tile.images;
    stage_pixels<kGroupedThreads>(staged, p.shared.staged, (p.batch - image) * p.halo.h * p.halo.w,
                                  p.image, source, p.c.channels, first_unit, units, image,
                                  at.row * p.halo.step_h + p.halo.first_h,
                                  at.column * p.halo.step_w + p.halo.first_w, buffer(tile));
    copy_async_commit();
  };
  stage_filters<kGroupedThreads>(p, first_unit, units, filters);
  list_halo<kGroupedThreads>(p.halo, p.tile.images, source, p.c.channels, staged);
  __syncthreads();
  TilePlace at = place_of(p.tiles, begin);
  stage(begin, at);
  list_outputs(p, stored, listed);
  list_halves(p, halves);

  // Every warp computes the same units of outputs for all tiles.
  const int abreast = quotient(warp, p.by_warps);
  const int first_tile = (warp - abreast * static_cast<int>(p.by_warps.value())) * Tiles;
  const int all_pieces = p.phases * p.pieces;
  const int rounds = abreast < p.abreast && first_tile < units ? p.rounds : 0;
  const int channel = (first_unit + first_tile) * kUnitChannels + lane % 4 * 2;
  const int group_unit = quotient(first_tile, p.c.by_group_units) * p.c.group_units;
  const SharedAddress group_bytes = static_cast<SharedAddress>(group_unit * kUnitBytes);
  // Four matrices: of one unit of outputs and four halves, or of two units and two halves.
  const int own_tile = first_tile + (Tiles > 1 ? lane / 16 : 0);
  const int own_row = (p.backward ? group_unit : own_tile) * kUnitChannels + lane % 8;
  OwnFilters own_filters{
      halves + lane / 8 % (Tiles > 1 ? 2 : 4),
      shared_address(filters) +
          static_cast<SharedAddress>(own_row * p.filter_bytes +
                                     (p.backward ? (own_tile - group_unit) * kUnitBytes : 0)),
      static_cast<SharedAddress>(2 * (p.backward ? kUnitBytes : kUnitChannels * p.filter_bytes)),
      p.backward};
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end) {
      TilePlace next = at;
      advance(p.tiles, next);
      stage(tile + 1, next);
    }
    // Calls f(element, place) for the thread's units of outputs: from y's beginning, and in `out`.
    const auto each_unit = [&](auto&& f) {
      const int image = at.image * p.tile.images, row = at.row * p.tile.rows;
      const int column = at.column * p.tile.columns, unit = thread % kSlabUnits;
      if (unit >= units) return;
      const int64_t first =
          ((int64_t{image} * p.h.outputs + row) * p.w.outputs + column) * p.c.channels +
          (first_unit + unit) * kUnitChannels;
      const int images = min(p.tile.images, p.batch - image);
      const Inside inside(0, images > 1 ? images * p.tile.rows : p.h.outputs - row, 0,
                          p.w.outputs - column);
#pragma unroll(Tiles == 1 ? 2 : 4)
      for (int i = thread / kSlabUnits; i < p.shared.listed; i += kGroupedThreads / kSlabUnits) {
        const StoredPixel to = stored[i];
        if (inside.has(to.at))
          f(first + to.to,
            reinterpret_cast<Vector<uint32_t, 4>*>(out + i * kPixelBytes + unit * kUnitBytes));
      }
    };
    // Where the pre-activation is wanted, a tile is computed twice.
#pragma unroll 1
    for (int pass = epilogue.preactivation == nullptr ? 1 : 0; pass < 2; ++pass) {
      const bool last = pass == 1;
      if (epilogue.residual != nullptr) {
        each_unit([&](int64_t element, Vector<uint32_t, 4>* unit) {
          *unit = *reinterpret_cast<const Vector<uint32_t, 4>*>(epilogue.residual + element);
        });
        __syncthreads();
      }
      for (int round = 0; round < rounds; ++round) {
        const int piece = piece_of(round, abreast, p.abreast);
        if (piece >= all_pieces) continue;
        const int phase = quotient(piece, p.by_pieces);
        const int first_listed = piece * 16 * Pairs;
        const uint32_t* own = listed + first_listed;
        SharedAddress pixel[Pairs];
#pragma unroll
        for (int m = 0; m < Pairs; ++m)
          pixel[m] = buffer(tile) + own[16 * m + lane % 16] + group_bytes;
        const StagedHalf* own_halves = halves + phase * p.phase_halves + lane / 16;
        OwnFilters phase_filters = own_filters;
        phase_filters.halves += phase * p.phase_halves;
        const int count = p.halves[phase];
        float sums[Pairs][Tiles][4];
#pragma unroll
        for (int m = 0; m < Pairs; ++m)
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
        accumulate<T>(sums, pixel, own_halves, phase_filters, count);
        if constexpr (Tiles == 1) {
          // Infinity times the zeros between groups is NaN: such sums once more, of their group
          // alone.
          if (p.c.group < kUnitChannels) {
            float probe = 0.0f;
#pragma unroll
            for (int m = 0; m < Pairs; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) probe += sums[m][0][e] * 0.0f;
            if (probe != 0.0f) {
              const unsigned char* pixels_of_unit =
                  shared + (tile & 1 & (p.buffers - 1)) * p.shared.buffer_bytes + group_bytes;
              const unsigned char* filters_of_unit =
                  filters + first_tile * kUnitChannels * p.filter_bytes;
#pragma unroll 1
              for (int i = 0; i < 4 * Pairs; ++i) {
                float sum = sums[0][0][0];
                if (sum * 0.0f != 0.0f)
                  sum =
                      sum_of_group<T>(p, phase, halves, pixels_of_unit + own[i / 2 * 8 + lane / 4],
                                      filters_of_unit, lane % 4 * 2 + i % 2);
                // The sums go round through the first register.
#pragma unroll
                for (int to = 0; to < 4 * Pairs; ++to)
                  sums[to / 4][0][to % 4] =
                      to + 1 < 4 * Pairs ? sums[(to + 1) / 4][0][(to + 1) % 4] : sum;
              }
            }
          }
        }
        float z[Pairs * Tiles * 4];
#pragma unroll
        for (int m = 0; m < Pairs; ++m)
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) z[(m * Tiles + n) * 4 + e] = sums[m][n][e];
        if (epilogue.bias != nullptr) {
          const T* bias = epilogue.bias + channel;
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float of_channel = to_wide(bias[n * kUnitChannels + e]);
#pragma unroll
              for (int row = 0; row < 2 * Pairs; ++row)
                z[(row / 2 * Tiles + n) * 4 + row % 2 * 2 + e] += of_channel;
            }
        }
        unsigned char* to =
            out + (first_listed + lane / 4) * kPixelBytes + first_tile * kUnitBytes + lane % 4 * 4;
        if (epilogue.residual != nullptr) {
#pragma unroll
          for (int row = 0; row < 2 * Pairs; ++row)
#pragma unroll
            for (int n = 0; n < Tiles; ++n) {
              const auto residual = *reinterpret_cast<const Vector<T, 2>*>(
                  to + row * 8 * kPixelBytes + n * kUnitBytes);
#pragma unroll
              for (int e = 0; e < 2; ++e)
                z[(row / 2 * Tiles + n) * 4 + row % 2 * 2 + e] += to_wide(residual.element[e]);
            }
        }
        activate_tile<4>(last ? epilogue.activation : Activation::kNone, z);
#pragma unroll
        for (int row = 0; row < 2 * Pairs; ++row)
#pragma unroll
          for (int n = 0; n < Tiles; ++n) {
            const float* pair = z + (row / 2 * Tiles + n) * 4 + row % 2 * 2;
            *reinterpret_cast<Vector<T, 2>*>(to + row * 8 * kPixelBytes + n * kUnitBytes) = {
                {from_wide<T>(pair[0]), from_wide<T>(pair[1])}};
          }
      }
      __syncthreads();
      T* y = last ? epilogue.y : epilogue.preactivation;
      each_unit([&](int64_t element, const Vector<uint32_t, 4>* unit) {
        *reinterpret_cast<Vector<uint32_t, 4>*>(y + element) = *unit;
      });
      if (!last) __syncthreads();
    }
    advance(p.tiles, at);
  }
}

template <typename T, int Pairs, int Tiles>
void launch_grouped_gather(const GroupedGather& p, const Epilogue<T>& epilogue,
                           const Queue& queue) {
  launch(grouped_gather_kernel<T, Pairs, Tiles>,
         dim3(static_cast<unsigned>(p.c.slabs), static_cast<unsigned>(p.tiles.parts)),
         dim3(kGroupedThreads), p.shared.bytes, queue, p, epilogue);
}

template <typename T>
void run_grouped_gather(const GroupedGather& p, const Epilogue<T>& epilogue, const Queue& queue) {
  switch (outputs_at_once(p.c)) {
    case 4:
      if (p.piece == 32) return launch_grouped_gather<T, 2, 4>(p, epilogue, queue);
      return launch_grouped_gather<T, 4, 4>(p, epilogue, queue);
    case 2:
      return launch_grouped_gather<T, 4, 2>(p, epilogue, queue);
    default:
      return launch_grouped_gather<T, 4, 1>(p, epilogue, queue);
  }
}

}  // namespace torchconv::cuda
