// The kernels of grouped_mma.h's gradient by the weights, for the files that instantiate them for
// one type each.
//
//   dw[k, tap, c] = sum over pixels of dz[pixel, k] * x[place of the pixel + tap, c]
//
// An mma takes 16 pixels, two octets: its A are two halves (tap, unit) of x, 8 channels each, and
// its B is one unit of dz; ldmatrix turns both. Every warp of a block has a job of its own, kMost
// pairs of halves x `Tiles` units of filters, over the block's part of the tiles. It leaves float32
// sums in scratch, every kChainPixels pixels because the hardware truncates where it adds; a second
// kernel adds the parts in order and drops the products between groups.
#pragma once

#include "cuda/grouped_mma_tile.h"

namespace torchconv::cuda {

inline constexpr int kGroupedChainPixels = 4096;
inline constexpr int kWgradThreads = 256, kWgradWarps = kWgradThreads / 32;

// Words of A, two pixels each: those of pixels that are among the first `valid` of an octet.
__device__ __forceinline__ uint32_t pixels_mask(int lane, int valid) {
  const int pixel = lane % 4 * 2;
  return (pixel < valid ? 0xFFFFu : 0u) | (pixel + 1 < valid ? 0xFFFF0000u : 0u);
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kWgradThreads, Tiles == 4 ? 1 : 2)
    grouped_wgrad_kernel(const __grid_constant__ GroupedWgrad p) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slab = static_cast<int>(blockIdx.x) % p.c.slabs;
  int rest = static_cast<int>(blockIdx.x) / p.c.slabs;
  const int job_blocks = (p.jobs + kWgradWarps - 1) / kWgradWarps;
  const int job = rest % job_blocks * kWgradWarps + warp, part = rest / job_blocks;
  const int first_unit = slab * p.c.slab_units;
  const int units = min(p.c.slab_units, p.c.channels / kUnitChannels - first_unit);
  const int first_tile = job / p.chunks * Tiles, first_pair = job % p.chunks * kWgradPairs;
  const bool busy = job < p.jobs && first_tile < units;
  const int halves = p.h.taps * p.w.taps * p.c.group_units;

  const StagedAxis h = staged(p.h), w = staged(p.w);
  const Halo halo = halo_of(p.tile, h, w);
  const int line = p.tile.octets * 8;
  const Halo outputs{p.tile.rows, line, line, line};
  const OctetTiles tiles(p.tile, p.batch, p.h.outputs, p.w.outputs);
  const int begin = tiles.part_begin(part, p.parts), end = tiles.part_begin(part + 1, p.parts);
  const int octets = p.tile.images * p.tile.rows * p.tile.octets, padded = round_up_int(octets, 2);
  unsigned char* shared = dynamic_shared<unsigned char>();
  const int buffer_bytes = p.halo_bytes + padded * 8 * kPixelBytes;
  OctetPlace* places = reinterpret_cast<OctetPlace*>(shared + 2 * buffer_bytes);
  const auto buffer = [&](int tile) {
    return shared_address(shared) + static_cast<SharedAddress>((tile & 1) * buffer_bytes);
  };
  const Slab x{static_cast<const unsigned char*>(p.x),
               p.batch,
               p.h.source,
               p.w.source,
               p.c.channels,
               first_unit,
               units};
  const Slab dz{static_cast<const unsigned char*>(p.dz),
                p.batch,
                p.h.outputs,
                p.w.outputs,
                p.c.channels,
                first_unit,
                units};
  const auto stage = [&](int tile) {
    const OctetPlace first = tiles.place(tile);
    stage_slab<kWgradWarps>(x, buffer(tile), p.tile.images, halo, p.scale_w, first.image,
                            first.row * h.scale - p.h.pad, first.column * w.scale - p.w.pad);
    stage_slab<kWgradWarps>(dz, buffer(tile) + static_cast<SharedAddress>(p.halo_bytes),
                            p.tile.images, outputs, Divisor(), first.image, first.row,
                            first.column);
    copy_async_commit();
  };
  if (begin < end) stage(begin);
  for (int i = thread; i < padded; i += kWgradThreads)
    places[i] = octet_of(p.tile, halo, h.scale, i);
  // An octet that only fills up a pair.
  for (int i = thread; i < (padded - octets) * 8 * kPixelBytes / 4 * 2; i += kWgradThreads)
    store_shared(buffer(i & 1) + static_cast<SharedAddress>(p.halo_bytes +
                                                            octets * 8 * kPixelBytes + i / 2 * 4),
                 0);

  // What the lane addresses of x: of each pair one half, of a pixel of one of two octets.
  int moved[kWgradPairs];  // bytes
#pragma unroll
  for (int m = 0; m < kWgradPairs; ++m) {
    const int half = min((first_pair + m) * 2 + lane / 8 % 2, halves - 1);
    const int tap = half / p.c.group_units, r = tap / p.w.taps, s = tap - r * p.w.taps;
    const int unit = first_tile / p.c.group_units * p.c.group_units + half - tap * p.c.group_units;
    moved[m] = move_in_halo(halo, p.scale_w, r * h.move, s * w.move) + lane % 8 * kPixelBytes +
               unit * kUnitBytes;
  }
  float sums[kWgradPairs][Tiles][4];
  const auto clear = [&] {
#pragma unroll
    for (int m = 0; m < kWgradPairs; ++m)
#pragma unroll
      for (int n = 0; n < Tiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;
  };
  clear();
  auto* to = reinterpret_cast<Vector<float, 4>*>(p.sums) +
             ((int64_t{part} * p.c.slabs + slab) * p.jobs + job) * (kWgradPairs * Tiles * 32) +
             lane;
  bool first_chain = true;
  const auto add_to_part = [&] {
    if (!busy) return;
#pragma unroll
    for (int m = 0; m < kWgradPairs; ++m)
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        Vector<float, 4>& sum = to[(m * Tiles + n) * 32];
        Vector<float, 4> all{};
        if (!first_chain) all = sum;
#pragma unroll
        for (int e = 0; e < 4; ++e) all.element[e] += sums[m][n][e];
        sum = all;
      }
    first_chain = false;
  };

  const int chain = max(kGroupedChainPixels / (octets * 8), 1);
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    if (tile + 1 < end) stage(tile + 1);
    if (busy) {
      const OctetPlace first = tiles.place(tile);
      const SharedAddress staged_x = buffer(tile);
      const SharedAddress staged_dz = staged_x + static_cast<SharedAddress>(p.halo_bytes);
#pragma unroll 1
      for (int octet = 0; octet < padded; octet += 2) {
        uint32_t mask[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const OctetPlace place = places[octet + i];
          const bool inside =
              all_of(first.image + place.image < p.batch, first.row + place.row < p.h.outputs);
          mask[i] = pixels_mask(lane, inside ? p.w.outputs - first.column - place.column : 0);
        }
        if (__ballot_sync(0xFFFFFFFFu, (mask[0] | mask[1]) != 0) == 0) continue;
        uint32_t b[(Tiles + 1) / 2][4];
#pragma unroll
        for (int n = 0; n < Tiles; n += 2)
          load_matrices_transposed(
              b[n / 2],
              staged_dz + static_cast<SharedAddress>(
                              ((octet + lane / 8 % 2) * 8 + lane % 8) * kPixelBytes +
                              (first_tile + n + (Tiles > 1 ? lane / 16 : 0)) * kUnitBytes));
        const int pixel = places[octet + lane / 16].pixel * kPixelBytes;
#pragma unroll
        for (int m = 0; m < kWgradPairs; ++m) {
          uint32_t a[4];
          load_matrices_transposed(a, staged_x + static_cast<SharedAddress>(pixel + moved[m]));
          // Where no output is, dz counts as zero, and x may be anything.
          a[0] &= mask[0], a[1] &= mask[0], a[2] &= mask[1], a[3] &= mask[1];
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
            mma<T>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    if ((tile - begin) % chain == chain - 1 && tile + 1 < end) {
      add_to_part();
      clear();
    }
  }
  add_to_part();
}

// dw from the parts: of `Lanes` threads for each sum every one adds its share of them.
template <typename T, int Tiles, int Lanes>
__global__ void __launch_bounds__(kWgradThreads)
    add_grouped_parts(const __grid_constant__ GroupedWgrad p) {
  constexpr int kColumns = kWgradThreads / Lanes;
  __shared__ float sums[Lanes][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, lane = thread / kColumns;
  const int size = p.c.slabs * p.jobs * (kWgradPairs * Tiles * 128);
  const int i = static_cast<int>(blockIdx.x) * kColumns + column;  // size is whole blocks

  int rest = i / 4;
  const int place = rest % 32, e = i % 4;
  rest /= 32;
  const int n = rest % Tiles, m = rest / Tiles % kWgradPairs;
  rest /= Tiles * kWgradPairs;
  const int job = rest % p.jobs, slab = rest / p.jobs;
  const int half = (job % p.chunks * kWgradPairs + m) * 2 + e / 2;
  const int tap = half / p.c.group_units, filter_unit = job / p.chunks * Tiles + n;
  const int unit = filter_unit / p.c.group_units * p.c.group_units + half % p.c.group_units;
  const int first = slab * p.c.slab_units * kUnitChannels;
  const int k = first + filter_unit * kUnitChannels + place % 4 * 2 + e % 2;
  const int c = first + unit * kUnitChannels + place / 4;
  const bool wanted =
      tap < p.h.taps * p.w.taps && k < p.c.channels && k / p.c.group == c / p.c.group;
  float sum = 0.0f;
  if (wanted)
#pragma unroll 4
    for (int part = lane; part < p.parts; part += Lanes) sum += p.sums[int64_t{part} * size + i];
  sums[lane][column] = sum;
  __syncthreads();
  if (lane != 0 || !wanted) return;
  for (int other = 1; other < Lanes; ++other) sum += sums[other][column];
  static_cast<T*>(p.dw)[(int64_t{k} * (p.h.taps * p.w.taps) + tap) * p.c.group + c % p.c.group] =
      from_wide<T>(sum);
}

template <typename T, int Tiles>
void launch_grouped_wgrad(GroupedWgrad p, const Queue& queue) {
  const int size = p.c.slabs * p.jobs * (kWgradPairs * Tiles * 128);
  p.sums = queue.scratch<float>(int64_t{p.parts} * size);
  const int blocks = p.c.slabs * static_cast<int>(ceil_div(p.jobs, kWgradWarps)) * p.parts;
  launch(grouped_wgrad_kernel<T, Tiles>, dim3(static_cast<unsigned>(blocks)), dim3(kWgradThreads),
         grouped_wgrad_shared(p), queue, p);
  const auto add = [&](auto kernel, int lanes) {
    launch(kernel, dim3(static_cast<unsigned>(size / (kWgradThreads / lanes))), dim3(kWgradThreads),
           0, queue, p);
  };
  if (p.parts > 8)
    add(add_grouped_parts<T, Tiles, 8>, 8);
  else
    add(add_grouped_parts<T, Tiles, 1>, 1);
}

template <typename T>
void run_grouped_wgrad(GroupedWgrad p, const Queue& queue) {
  switch (outputs_at_once(p.c)) {
    case 4:
      return launch_grouped_wgrad<T, 4>(p, queue);
    case 2:
      return launch_grouped_wgrad<T, 2>(p, queue);
    default:
      return launch_grouped_wgrad<T, 1>(p, queue);
  }
}

}  // namespace torchconv::cuda
