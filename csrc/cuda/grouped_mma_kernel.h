// The kernel of grouped_mma.h's forward pass and gradient by the image, for the files that
// instantiate it for one type each.
//
// The outputs of a tile are a list, phase by phase, cut into pieces of 16 * Pairs. A warp computes
// a piece x `Tiles` units of outputs at a time, always of the same units. Weights lie in shared
// memory as the words of mma's B, in the order in which lanes read them. Outputs are gathered in
// shared memory, so that whole lines of memory are written.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/grouped_mma_tile.h"

namespace torchconv::cuda {

inline constexpr int kGatherWarps = 8, kGroupedThreads = 32 * kGatherWarps;
template <int Tiles>
inline constexpr int kGroupedBlocks = Tiles == 1 ? 3 : 2;

// Where an output of the list finds its pixel in a buffer, in bytes, and which pixel of the tile it
// is; the one behind the last where the list is only filled up.
struct alignas(8) ListedOutput {
  uint32_t from;
  int32_t pixel;
};

// A half of a phase's reduction: by how many bytes it is on from an output's pixel, and the element
// of a group's filters.
struct alignas(8) StagedHalf {
  int32_t bytes, filter;
};

// What a block has in shared memory, in this order.
struct GatherShared {
  int buffer_bytes, staged, stored, listed, filter_words, halves;
  __host__ __device__ explicit GatherShared(const GroupedGather& p)
      : buffer_bytes(p.tile.images * p.halo.h * p.halo.pitch * kPixelBytes),
        staged(p.tile.images * p.halo.h * p.halo.w),
        stored(p.tile.images * p.tile.rows * p.tile.columns + 1),
        listed(p.phases * p.pieces * p.piece),
        filter_words(p.c.slab_units * p.first_step[p.phases] * 64),
        halves(2 * p.first_step[p.phases]) {}
  __host__ __device__ int bytes(int buffers) const {
    return buffers * buffer_bytes + stored * kPixelBytes +
           staged * static_cast<int>(sizeof(StagedPixel)) + filter_words * 4 +
           (stored + listed + halves) * 8;
  }
};

// Weights of `units` units of outputs from first_unit on, as B's words.
template <typename T>
__device__ __forceinline__ void stage_filters(const GroupedGather& p, const StagedHalf* halves,
                                              int first_unit, int units, uint32_t* to) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int row = lane / 4, column = lane % 4 * 2, steps = p.first_step[p.phases];
  const int group = p.c.group, group_filters = group * p.h.taps * p.w.taps * group;
  // Narrow groups: the lane's own.
  const bool narrow = group < kUnitChannels;
  const int lane_group = narrow ? row / group : 0;
  const uint16_t* filters = static_cast<const uint16_t*>(p.filters) + lane_group * group_filters +
                            (row - lane_group * group) * p.filter_output;
  const uint16_t* source[2];
  bool valid[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int of = narrow ? (column + e) / group : 0;
    valid[e] = of == lane_group;
    source[e] = filters + (column + e - of * group) * p.filter_channel;
  }
  int unit_filters[kSlabUnits];
#pragma unroll
  for (int tile = 0; tile < kSlabUnits; ++tile) {
    const int first = first_unit + tile;  // of the outputs, all groups counted
    unit_filters[tile] =
        first * kUnitChannels / group * group_filters +
        first % p.c.group_units * kUnitChannels * static_cast<int>(p.filter_output);
  }
  for (int half = thread / 32; half < 2 * steps; half += kGatherWarps) {
    const int of_half = halves[half].filter;
    uint32_t word[kSlabUnits];
#pragma unroll
    for (int tile = 0; tile < kSlabUnits; ++tile) {
      word[tile] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (of_half >= 0 && tile < units && valid[e])
          word[tile] |= uint32_t{__ldg(source[e] + of_half + unit_filters[tile])} << (16 * e);
    }
#pragma unroll
    for (int tile = 0; tile < kSlabUnits; ++tile)
      if (tile < units) to[((tile * steps + half / 2) * 32 + lane) * 2 + half % 2] = word[tile];
  }
}

// The tables of outputs and of halves; those of halos are grouped_mma_tile.h's.
__device__ __forceinline__ void list_outputs(const GroupedGather& p, StoredPixel* stored,
                                             ListedOutput* listed) {
  const int thread = static_cast<int>(threadIdx.x), pixels = p.tile.rows * p.tile.columns;
  for (int i = thread; i < p.tile.images * pixels; i += kGroupedThreads) {
    const int line = i / p.tile.columns, column = i - line * p.tile.columns;
    const int image = line / p.tile.rows, row = line - image * p.tile.rows;
    stored[i] = {((image * p.h.outputs + row) * p.w.outputs + column) * p.c.channels,
                 row_column(row, column)};
  }
  const int of_phase = p.pieces * p.piece;
  const int step_h = p.backward ? p.h.stride : 1, step_w = p.backward ? p.w.stride : 1;
  for (int i = thread; i < p.phases * of_phase; i += kGroupedThreads) {
    const int phase = i / of_phase, phase_h = phase / p.w.phases;
    const int phase_w = phase - phase_h * p.w.phases;
    const AxisPhase h = phase_of(p.h, p.backward, phase_h), w = phase_of(p.w, p.backward, phase_w);
    const int rows = (p.tile.rows - 1 - phase_h) / step_h + 1;
    const int columns = (p.tile.columns - 1 - phase_w) / step_w + 1;
    const int count = p.tile.images * rows * columns, own = i - phase * of_phase;
    const int place = min(own, count - 1), line = place / columns, column = place - line * columns;
    const int image = line / rows, row = line - image * rows;
    const int from_h = row * h.scale + h.base - p.halo.first_h;
    const int from_w = column * w.scale + w.base - p.halo.first_w;
    const int in_run = from_w / p.halo.scale_w, run = from_w - in_run * p.halo.scale_w;
    listed[i] = {
        static_cast<uint32_t>(
            ((image * p.halo.h + from_h) * p.halo.pitch + run * p.halo.run + in_run) * kPixelBytes),
        own < count ? (image * p.tile.rows + row * step_h + phase_h) * p.tile.columns +
                          column * step_w + phase_w
                    : p.tile.images * pixels};
  }
}

__device__ __forceinline__ void list_halves(const GroupedGather& p, StagedHalf* halves) {
  for (int phase = 0; phase < p.phases; ++phase) {
    const AxisPhase h = phase_of(p.h, p.backward, phase / p.w.phases);
    const AxisPhase w = phase_of(p.w, p.backward, phase % p.w.phases);
    const int begin = 2 * p.first_step[phase], end = 2 * p.first_step[phase + 1];
    for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kGroupedThreads) {
      const int tap = (i - begin) / p.c.group_units, unit = i - begin - tap * p.c.group_units;
      const int r = tap / max(w.taps, 1), s = tap - r * w.taps;
      const int move = s * w.move, in_run = move / p.halo.scale_w;  // of runs none is negative
      const int columns = (move - in_run * p.halo.scale_w) * p.halo.run + in_run;
      const int filter =
          ((h.first_tap + r * h.tap_step) * p.w.taps + w.first_tap + s * w.tap_step) * p.c.group +
          unit * kUnitChannels * static_cast<int>(p.filter_channel);
      halves[i] = {(r * h.move * p.halo.pitch + columns) * kPixelBytes + unit * kUnitBytes,
                   i - begin < p.halves[phase] ? filter : -1};
    }
  }
}

// Words of A that a lane contributes to a group of `group` channels from `first` on.
__device__ __forceinline__ uint32_t channels_mask(int lane, int group, int first) {
  const int column = lane % 4 * 2;
  return ((column & -group) == first ? 0xFFFFu : 0u) |
         (((column + 1) & -group) == first ? 0xFFFF0000u : 0u);
}

// The steps of one phase. filters and halves: the lane's, of the phase's first step; pitch: words
// from one unit's filters to the next.
template <typename T, int Pairs, int Tiles, bool Masked>
__device__ __forceinline__ void accumulate(float (&sums)[Pairs][Tiles][4],
                                           const SharedAddress (&pixel)[Pairs],
                                           const StagedHalf* halves, const uint32_t* filters,
                                           int pitch, int halves_used, uint32_t mask) {
  const auto multiply = [&](bool both) {
    const SharedAddress half = static_cast<SharedAddress>(halves->bytes);
    Vector<uint32_t, 2> b[Tiles];
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
      b[n] = *reinterpret_cast<const Vector<uint32_t, 2>*>(filters + n * pitch);
    uint32_t a[Pairs][4];
#pragma unroll
    for (int m = 0; m < Pairs; ++m) {
      load_matrices(a[m], pixel[m] + half);
      if constexpr (Masked) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] &= mask;
      }
      if (!both) a[m][2] = a[m][3] = 0;  // where zero weights would make NaN of infinity
    }
#pragma unroll
    for (int m = 0; m < Pairs; ++m)
#pragma unroll
      for (int n = 0; n < Tiles; ++n) mma<T>(sums[m][n], a[m], b[n].element[0], b[n].element[1]);
    halves += 2, filters += 64;
  };
#pragma unroll(Tiles == 2 ? 2 : 1)
  for (int step = 0; step < halves_used / 2; ++step) multiply(true);
  if (halves_used % 2 != 0) multiply(false);
}

template <typename T, int Pairs, int Tiles>
__global__ void __launch_bounds__(kGroupedThreads, kGroupedBlocks<Tiles>)
    grouped_gather_kernel(const __grid_constant__ GroupedGather p, const Epilogue<T> epilogue) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slab = static_cast<int>(blockIdx.x) % p.c.slabs;
  const int part = static_cast<int>(blockIdx.x) / p.c.slabs;
  const int first_unit = slab * p.c.slab_units;
  const int units = min(p.c.slab_units, p.c.channels / kUnitChannels - first_unit);
  const PixelTiles tiles(p.tile, p.batch, p.h.outputs, p.w.outputs);
  const int begin = tiles.part_begin(part, p.parts), end = tiles.part_begin(part + 1, p.parts);
  if (begin >= end) return;

  const GatherShared layout(p);
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* out = shared + p.buffers * layout.buffer_bytes;
  StagedPixel* staged = reinterpret_cast<StagedPixel*>(out + layout.stored * kPixelBytes);
  uint32_t* filters = reinterpret_cast<uint32_t*>(staged + layout.staged);
  StoredPixel* stored = reinterpret_cast<StoredPixel*>(filters + layout.filter_words);
  ListedOutput* listed = reinterpret_cast<ListedOutput*>(stored + layout.stored);
  StagedHalf* halves = reinterpret_cast<StagedHalf*>(listed + layout.listed);
  const auto buffer = [&](int tile) {
    return shared_address(shared) +
           static_cast<SharedAddress>((tile & 1 & (p.buffers - 1)) * layout.buffer_bytes);
  };
  const Plane source{p.h.source, p.w.source};
  const auto stage = [&](int tile, const TilePlace& at) {
    const int image = at.image * p.tile.images;
    stage_pixels<kGroupedThreads>(staged, layout.staged, (p.batch - image) * p.halo.h * p.halo.w,
                                  p.image, source, p.c.channels, first_unit, units, image,
                                  at.row * p.halo.step_h + p.halo.first_h,
                                  at.column * p.halo.step_w + p.halo.first_w, buffer(tile));
    copy_async_commit();
  };
  list_halo<kGroupedThreads>(p.halo, p.tile.images, source, p.c.channels, staged);
  list_halves(p, halves);
  __syncthreads();
  TilePlace next = tiles.place(begin);
  stage(begin, next);
  list_outputs(p, stored, listed);
  stage_filters<T>(p, halves, first_unit, units, filters);

  const int tile_groups = units / Tiles, warps_abreast = kGatherWarps / tile_groups;
  const int first_tile = warp % tile_groups * Tiles, abreast = warp / tile_groups;
  const int all_pieces = p.phases * p.pieces;
  const int rounds = abreast < warps_abreast ? (all_pieces + warps_abreast - 1) / warps_abreast : 0;
  const int channel = first_tile * kUnitChannels + lane % 4 * 2;  // in the slab
  const SharedAddress group_bytes =
      static_cast<SharedAddress>(first_tile / p.c.group_units * p.c.group_units * kUnitBytes);
  const int pitch = 64 * p.first_step[p.phases];
  const uint32_t* own_filters = filters + first_tile * pitch + 2 * lane;
  float bias[Tiles][2];
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      bias[n][e] = epilogue.bias_of((first_unit + n) * kUnitChannels + channel + e);

  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    const TilePlace at = next;
    if (tile + 1 < end) {
      tiles.advance(next);
      stage(tile + 1, next);
    }
    const int image = at.image * p.tile.images, row = at.row * p.tile.rows;
    const int column = at.column * p.tile.columns;
    const int64_t first_output =
        ((int64_t{image} * p.h.outputs + row) * p.w.outputs + column) * p.c.channels +
        first_unit * kUnitChannels;
    const Inside inside(0, p.h.outputs - row, 0, p.w.outputs - column);
    const int pixels = min(p.tile.images, p.batch - image) * p.tile.rows * p.tile.columns;
    for (int round = 0; round < rounds; ++round) {
      // There and back: phases that have few taps come first.
      const int piece =
          round * warps_abreast + (round % 2 == 0 ? abreast : warps_abreast - 1 - abreast);
      if (piece >= all_pieces) continue;
      const int phase = p.phases == 1 ? 0 : piece / p.pieces;
      const ListedOutput* own = listed + piece * 16 * Pairs;
      SharedAddress pixel[Pairs];
#pragma unroll
      for (int m = 0; m < Pairs; ++m)
        pixel[m] = buffer(tile) + own[16 * m + lane % 16].from + group_bytes;
      const StagedHalf* own_halves = halves + 2 * p.first_step[phase] + lane / 16;
      const uint32_t* phase_filters = own_filters + 64 * p.first_step[phase];
      const int halves_used = p.halves[phase];
      float sums[Pairs][Tiles][4];
#pragma unroll
      for (int m = 0; m < Pairs; ++m)
#pragma unroll
        for (int n = 0; n < Tiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
      accumulate<T, Pairs, Tiles, false>(sums, pixel, own_halves, phase_filters, pitch, halves_used,
                                         0);
      if constexpr (Tiles == 1) {
        // Infinity times the zeros between groups is NaN: then each group by itself.
        if (p.c.group < kUnitChannels) {
          float probe = 0.0f;
#pragma unroll
          for (int m = 0; m < Pairs; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) probe += sums[m][0][e] * 0.0f;
          if (__ballot_sync(0xFFFFFFFFu, probe != 0.0f) != 0) {
#pragma unroll 1
            for (int group = 0; group < kUnitChannels; group += p.c.group) {
              float alone[Pairs][1][4] = {};
              accumulate<T, Pairs, 1, true>(alone, pixel, own_halves, phase_filters, pitch,
                                            halves_used, channels_mask(lane, p.c.group, group));
#pragma unroll
              for (int m = 0; m < Pairs; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                  if (((lane % 4 * 2 + e % 2) & -p.c.group) == group)
                    sums[m][0][e] = alone[m][0][e];
            }
          }
        }
      }
      float z[Pairs * Tiles * 4];
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int m = 0; m < Pairs; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[(m * Tiles + n) * 4 + e] = sums[m][n][e] + bias[n][e % 2];
      const ListedOutput* rows = own + lane / 4;
      if (epilogue.preactivation != nullptr) {
#pragma unroll
        for (int row = 0; row < 2 * Pairs; ++row) {
          const int to = rows[8 * row].pixel;
          if (to >= pixels || !inside.has(stored[to].at)) continue;
#pragma unroll
          for (int n = 0; n < Tiles; ++n) {
            const float* pair = z + (row / 2 * Tiles + n) * 4 + row % 2 * 2;
            *reinterpret_cast<Vector<T, 2>*>(epilogue.preactivation + first_output + stored[to].to +
                                             channel + n * kUnitChannels) = {
                {from_wide<T>(pair[0]), from_wide<T>(pair[1])}};
          }
        }
      }
      activate_tile<4>(epilogue.activation, z);
#pragma unroll
      for (int row = 0; row < 2 * Pairs; ++row) {
        unsigned char* to =
            out + rows[8 * row].pixel * kPixelBytes + first_tile * kUnitBytes + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < Tiles; ++n) {
          const float* pair = z + (row / 2 * Tiles + n) * 4 + row % 2 * 2;
          *reinterpret_cast<Vector<T, 2>*>(to + n * kUnitBytes) = {
              {from_wide<T>(pair[0]), from_wide<T>(pair[1])}};
        }
      }
    }
    __syncthreads();
    const int unit = thread % kSlabUnits;
    if (unit < units) {
      T* y = epilogue.y + first_output + unit * kUnitChannels;
#pragma unroll 4
      for (int i = thread / kSlabUnits; i < pixels; i += kGroupedThreads / kSlabUnits) {
        const StoredPixel to = stored[i];
        const Vector<uint32_t, 4> all = *reinterpret_cast<const Vector<uint32_t, 4>*>(
            out + i * kPixelBytes + unit * kUnitBytes);
        if (inside.has(to.at)) *reinterpret_cast<Vector<uint32_t, 4>*>(y + to.to) = all;
      }
    }
  }
}

template <typename T, int Pairs, int Tiles>
void launch_grouped_gather(const GroupedGather& p, const Epilogue<T>& epilogue,
                           const Queue& queue) {
  launch(grouped_gather_kernel<T, Pairs, Tiles>, dim3(static_cast<unsigned>(p.c.slabs * p.parts)),
         dim3(kGroupedThreads), GatherShared(p).bytes(p.buffers), queue, p, epilogue);
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
