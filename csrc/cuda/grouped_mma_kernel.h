// The kernel of grouped_mma.h's forward pass and gradient by the image, for the files that
// instantiate it for one type each.
//
// A warp computes four octet pairs x `Tiles` units of outputs at a time. Weights lie in shared
// memory as the words of mma's B, in the order in which lanes read them.
#pragma once

#include "cuda/activate_tile.h"
#include "cuda/grouped_mma_tile.h"
#include "cuda/mma_gather_kernel.h"

namespace torchconv::cuda {

// Pairs of octets, and so rows of 16 sums, of a warp.
inline constexpr int kPairs = 4;

inline constexpr int kGroupedThreads = 32 * kGatherWarps;
template <int Tiles>
inline constexpr int kGroupedBlocks = Tiles == 2 ? 2 : 3;

// A half of a reduction in a staged tile: how many bytes it is on from an output's pixel; or, where
// there is none, from the tile's beginning to the pixel of zeros.
struct alignas(8) StagedHalf {
  int32_t bytes, mask;
};

// Taps in the order in which they move forward.
__device__ __forceinline__ AxisPhase rising(AxisPhase a) {
  if (a.move < 0 && a.taps > 0) {
    a.base += (a.taps - 1) * a.move;
    a.first_tap += (a.taps - 1) * a.tap_step;
    a.move = -a.move, a.tap_step = -a.tap_step;
  }
  return a;
}

// Weights of `units` units of outputs from first_unit on, as B's words.
template <typename T>
__device__ __forceinline__ void stage_filters(const GroupedGather& p, const AxisPhase& h,
                                              const AxisPhase& w, int first_unit, int units,
                                              int steps, uint32_t* to) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int row = lane / 4, column = lane % 4 * 2;
  const int group = p.c.group, halves = h.taps * w.taps * p.c.group_units;
  const int group_filters = group * p.h.taps * p.w.taps * group;
  // Narrow groups: the lane's own.
  const bool narrow = group < kUnitChannels;
  const int lane_group = narrow ? row / group : 0;
  const T* filters = static_cast<const T*>(p.filters) + lane_group * group_filters +
                     (row - lane_group * group) * p.filter_output;
  const T* source[2];
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
    const int tap = half / p.c.group_units, unit = half - tap * p.c.group_units;
    const int r = tap / w.taps, s = tap - r * w.taps;
    const int of_half =
        unit * kUnitChannels * static_cast<int>(p.filter_channel) +
        ((h.first_tap + r * h.tap_step) * p.w.taps + w.first_tap + s * w.tap_step) * group;
    uint32_t word[kSlabUnits];
#pragma unroll
    for (int tile = 0; tile < kSlabUnits; ++tile) {
      word[tile] = 0;
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (half < halves && tile < units && valid[e])
          word[tile] |= uint32_t{__ldg(reinterpret_cast<const uint16_t*>(source[e]) + of_half +
                                       unit_filters[tile])}
                        << (16 * e);
    }
#pragma unroll
    for (int tile = 0; tile < kSlabUnits; ++tile)
      if (tile < units) to[((tile * steps + half / 2) * 32 + lane) * 2 + half % 2] = word[tile];
  }
}

// Words of A that a lane of a narrow group contributes: of channels outside `of` groups none.
__device__ __forceinline__ uint32_t channels_mask(int lane, int group, int of) {
  const int column = lane % 4 * 2;
  return (column / group == of ? 0xFFFFu : 0u) | ((column + 1) / group == of ? 0xFFFF0000u : 0u);
}

template <typename T, int Tiles, bool Masked>
__device__ __forceinline__ void accumulate(float (&sums)[kPairs][Tiles][4], SharedAddress image,
                                           const int (&pixel)[kPairs], const StagedHalf* halves,
                                           const uint32_t* filters, int steps, uint32_t mask) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kPairs; ++m)
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
  halves += lane / 16;
  filters += 2 * lane;
  // Where a multiprocessor has few warps, one must have more loads on their way.
#pragma unroll(Tiles == 1 ? 1 : 2)
  for (int step = 0; step < steps; ++step) {
    const StagedHalf half = halves[2 * step];
    Vector<uint32_t, 2> b[Tiles];
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
      b[n] = *reinterpret_cast<const Vector<uint32_t, 2>*>(filters + (n * steps + step) * 64);
    uint32_t a[kPairs][4];
#pragma unroll
    for (int m = 0; m < kPairs; ++m) {
      load_matrices(a[m], image + static_cast<SharedAddress>((pixel[m] & half.mask) + half.bytes));
      if constexpr (Masked) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] &= mask;
      }
    }
#pragma unroll
    for (int m = 0; m < kPairs; ++m)
#pragma unroll
      for (int n = 0; n < Tiles; ++n) mma<T>(sums[m][n], a[m], b[n].element[0], b[n].element[1]);
  }
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kGroupedThreads, kGroupedBlocks<Tiles>)
    grouped_gather_kernel(const __grid_constant__ GroupedGather p, const Epilogue<T> epilogue) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slab = static_cast<int>(blockIdx.x) % p.c.slabs;
  const int rest = static_cast<int>(blockIdx.x) / p.c.slabs;
  const int part = rest % p.parts, phase = rest / p.parts;
  const AxisPhase h = rising(phase_of(p.h, p.backward, phase / p.w.phases));
  const AxisPhase w = rising(phase_of(p.w, p.backward, phase % p.w.phases));
  const int first_unit = slab * p.c.slab_units;
  const int units = min(p.c.slab_units, p.c.channels / kUnitChannels - first_unit);
  const int halves_used = h.taps * w.taps * p.c.group_units, steps = (halves_used + 1) / 2;
  const Halo halo = halo_of(p.tile, h, w);
  const OctetTiles tiles(p.tile, p.batch, h.outputs, w.outputs);
  const int begin = tiles.part_begin(part, p.parts), end = tiles.part_begin(part + 1, p.parts);
  if (begin >= end) return;

  const int octets = round_up_int(p.tile.images * p.tile.rows * p.tile.octets, 2 * kPairs);
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* out = shared + 2 * p.buffer_bytes;
  uint32_t* filters = reinterpret_cast<uint32_t*>(out + octets * 8 * kPixelBytes);
  OctetPlace* places = reinterpret_cast<OctetPlace*>(filters + p.c.slab_units * p.steps * 64);
  StagedHalf* halves = reinterpret_cast<StagedHalf*>(places + octets);
  const auto buffer = [&](int tile) {
    return shared_address(shared) + static_cast<SharedAddress>((tile & 1) * p.buffer_bytes);
  };
  const Slab source{static_cast<const unsigned char*>(p.image),
                    p.batch,
                    p.h.source,
                    p.w.source,
                    p.c.channels,
                    first_unit,
                    units};
  const auto stage = [&](int tile, const OctetPlace& first) {
    stage_slab<kGatherWarps>(source, buffer(tile), p.tile.images, halo, p.scale_w, first.image,
                             first.row * h.scale + h.base, first.column * w.scale + w.base);
    copy_async_commit();
  };
  OctetPlace next = tiles.place(begin);
  stage(begin, next);
  const int zeros = p.buffer_bytes - kPixelBytes;
  for (int i = thread; i < 2 * kPixelBytes / 4; i += kGroupedThreads)
    store_shared(buffer(i & 1) + static_cast<SharedAddress>(zeros + i / 2 * 4), 0);
  for (int i = thread; i < octets; i += kGroupedThreads)
    places[i] = octet_of(p.tile, halo, h.scale, i);
  for (int i = thread; i < 2 * steps; i += kGroupedThreads) {
    const int tap = i / p.c.group_units, r = tap / max(w.taps, 1), s = tap - r * w.taps;
    halves[i] = i < halves_used ? StagedHalf{move_in_halo(halo, p.scale_w, r * h.move, s * w.move) +
                                                 (i - tap * p.c.group_units) * kUnitBytes,
                                             -1}
                                : StagedHalf{zeros, 0};
  }
  stage_filters<T>(p, h, w, first_unit, units, steps, filters);

  // Every warp computes the same units of outputs for all tiles.
  const int tile_groups = units / Tiles, warps_abreast = kGatherWarps / tile_groups;
  const int first_tile = warp % tile_groups * Tiles;
  const int first_piece = warp / tile_groups < warps_abreast ? warp / tile_groups : octets;
  const int group_bytes = first_tile / p.c.group_units * p.c.group_units * kUnitBytes;
  const int channel = first_tile * kUnitChannels + lane % 4 * 2;  // in the slab
  const uint32_t* b = filters + first_tile * steps * 64;
  float bias[Tiles][2];
#pragma unroll
  for (int n = 0; n < Tiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      bias[n][e] = epilogue.bias_of((first_unit + n) * kUnitChannels + channel + e);
  const auto offset_of = [&](const OctetPlace& first, const OctetPlace& place, int j) {
    const int n = first.image + place.image, row = first.row + place.row;
    const int column = first.column + place.column + j;
    if (n >= p.batch || row >= h.outputs || column >= w.outputs) return -1;
    return ((n * p.h.outputs + h.first_output + row * h.output_step) * p.w.outputs +
            w.first_output + column * w.output_step) *
               p.c.channels +
           first_unit * kUnitChannels;
  };

  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    const OctetPlace first = next;
    if (tile + 1 < end) {
      next = tiles.place(tile + 1);
      stage(tile + 1, next);
    }
    for (int piece = first_piece; piece < octets / (2 * kPairs); piece += warps_abreast) {
      const int first_octet = piece * 2 * kPairs;
      int pixel[kPairs];
#pragma unroll
      for (int m = 0; m < kPairs; ++m)
        pixel[m] = (places[first_octet + 2 * m + lane / 8 % 2].pixel + lane % 8) * kPixelBytes +
                   group_bytes;
      float sums[kPairs][Tiles][4];
      accumulate<T, Tiles, false>(sums, buffer(tile), pixel, halves, b, steps, 0);
      if constexpr (Tiles == 1) {
        // Infinity times the zeros between groups is NaN: then each group by itself.
        if (p.c.group < kUnitChannels) {
          float probe = 0.0f;
#pragma unroll
          for (int m = 0; m < kPairs; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) probe += sums[m][0][e] * 0.0f;
          if (__ballot_sync(0xFFFFFFFFu, probe != 0.0f) != 0) {
#pragma unroll 1
            for (int group = 0; group < kUnitChannels / p.c.group; ++group) {
              float own[kPairs][1][4];
              accumulate<T, 1, true>(own, buffer(tile), pixel, halves, b, steps,
                                     channels_mask(lane, p.c.group, group));
#pragma unroll
              for (int m = 0; m < kPairs; ++m)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                  if ((lane % 4 * 2 + e % 2) / p.c.group == group) sums[m][0][e] = own[m][0][e];
            }
          }
        }
      }
      float z[kPairs * Tiles * 4];
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int m = 0; m < kPairs; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[(m * Tiles + n) * 4 + e] = sums[m][n][e] + bias[n][e % 2];
      if (epilogue.preactivation != nullptr) {
#pragma unroll
        for (int m = 0; m < kPairs; ++m)
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const int offset = offset_of(first, places[first_octet + 2 * m + upper], lane / 4);
            if (offset < 0) continue;
#pragma unroll
            for (int n = 0; n < Tiles; ++n) {
              const float* pair = z + (m * Tiles + n) * 4 + 2 * upper;
              *reinterpret_cast<Vector<T, 2>*>(epilogue.preactivation + offset + channel +
                                               n * kUnitChannels) = {
                  {from_wide<T>(pair[0]), from_wide<T>(pair[1])}};
            }
          }
      }
      activate_tile<4>(epilogue.activation, z);
      unsigned char* to =
          out + (first_octet * 8 + lane / 4) * kPixelBytes + first_tile * kUnitBytes + lane % 4 * 4;
#pragma unroll
      for (int m = 0; m < kPairs; ++m)
#pragma unroll
        for (int upper = 0; upper < 2; ++upper)
#pragma unroll
          for (int n = 0; n < Tiles; ++n) {
            const float* pair = z + (m * Tiles + n) * 4 + 2 * upper;
            *reinterpret_cast<Vector<T, 2>*>(to + (2 * m + upper) * 8 * kPixelBytes +
                                             n * kUnitBytes) = {
                {from_wide<T>(pair[0]), from_wide<T>(pair[1])}};
          }
    }
    __syncthreads();
#pragma unroll 4
    for (int i = thread; i < octets * 64; i += kGroupedThreads) {
      const int from = i / 8, unit = i % 8;
      const int offset = offset_of(first, places[from / 8], from % 8);
      if (offset >= 0 && unit < units)
        *reinterpret_cast<Vector<uint32_t, 4>*>(epilogue.y + offset + unit * kUnitChannels) =
            *reinterpret_cast<const Vector<uint32_t, 4>*>(out + from * kPixelBytes +
                                                          unit * kUnitBytes);
    }
  }
}

template <typename T, int Tiles>
void launch_grouped_gather(const GroupedGather& p, const Epilogue<T>& epilogue,
                           const Queue& queue) {
  launch(grouped_gather_kernel<T, Tiles>,
         dim3(static_cast<unsigned>(p.c.slabs * p.parts * p.h.phases * p.w.phases)),
         dim3(kGroupedThreads), grouped_gather_shared(p), queue, p, epilogue);
}

template <typename T>
void run_grouped_gather(GroupedGather p, const Epilogue<T>& epilogue, const Queue& queue) {
  if (outputs_at_once(p.c) == 2) return launch_grouped_gather<T, 2>(p, epilogue, queue);
  launch_grouped_gather<T, 1>(p, epilogue, queue);
}

}  // namespace torchconv::cuda
