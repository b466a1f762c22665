// The kernels of grouped_mma.h's gradient by the weights, for the files that instantiate them for
// one type each.
//
//   dw[k, tap, c] = sum over pixels of dz[pixel, k] * x[place of the pixel + tap, c]
//
// An mma takes 16 pixels of a tile: its A are two halves (tap, unit) of x, 8 channels each, and its
// B is one unit of dz; ldmatrix turns both. A warp has a job, `Pairs` pairs of halves x `Tiles`
// units of filters, over the block's part of the tiles; where a slab has few jobs, warps share one
// and take slices of a tile's pixels. A block leaves float32 sums in scratch, and a second kernel
// adds the parts in order and drops the products between groups. The hardware truncates where it
// adds: no warp adds more than kChainPixels pixels to one sum.
#pragma once

#include "cuda/grouped_mma_tile.h"

namespace torchconv::cuda {

inline constexpr int kGroupedChainPixels = 4096;

// What fits a slab of groups of as many units, with 3 x 3 taps above all: 18 pairs of 32 channels
// and 36 of 64 come out even.
template <int Units>
struct WgradShape {
  static constexpr int kTiles = Units, kPairs = Units == 4 ? 6 : 5, kWarps = Units == 4 ? 12 : 8;
  static constexpr int kThreads = 32 * kWarps, kBlocks = Units == 4 ? 1 : 2;
  static constexpr int kVectors = kPairs * kTiles * 32;  // of 4 sums, of a job
};

// f(WgradShape) for a problem's.
template <typename F>
auto with_wgrad_shape(const GroupedChannels& c, F&& f) {
  switch (outputs_at_once(c)) {
    case 4:
      return f(WgradShape<4>{});
    case 2:
      return f(WgradShape<2>{});
    default:
      return f(WgradShape<1>{});
  }
}

// What a block has in shared memory, in this order.
struct WgradShared {
  int halo_bytes, buffer_bytes, staged_x, staged_dz, padded;
  __host__ __device__ explicit WgradShared(const GroupedWgrad& p)
      : halo_bytes(p.tile.images * p.halo.h * p.halo.pitch * kPixelBytes),
        staged_x(p.tile.images * p.halo.h * p.halo.w),
        staged_dz(p.tile.images * p.tile.rows * p.tile.columns),
        padded(round_up_int(staged_dz, 16)) {
    buffer_bytes = halo_bytes + padded * kPixelBytes;
  }
  __host__ __device__ int bytes(int buffers, int slice_sums) const {
    const int tables = (staged_x + staged_dz) * static_cast<int>(sizeof(StagedPixel)) + padded * 4;
    const int all = buffers * buffer_bytes + tables;
    return all > slice_sums ? all : slice_sums;
  }
};

// Bytes of the sums that slices leave to the first.
template <typename Shape>
int slice_bytes(const GroupedWgrad& p) {
  return (p.slices - 1) * p.block_jobs * Shape::kVectors * 16;
}

// Pixels 2t, 2t + 1, 2t + 8 and 2t + 9 from `first` on, as masks of A's words.
__device__ __forceinline__ void mask_pixels(uint32_t (&mask)[2], const StagedPixel* dz, int first,
                                            int pixels, const Inside& inside) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mask[i] = 0;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int pixel = first + static_cast<int>(threadIdx.x) % 4 * 2 + 8 * i + e;
      if (pixel < pixels && inside.has(dz[pixel].at)) mask[i] |= e == 0 ? 0xFFFFu : 0xFFFF0000u;
    }
  }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    grouped_wgrad_kernel(const __grid_constant__ GroupedWgrad p) {
  constexpr int kTiles = Shape::kTiles, kPairs = Shape::kPairs, kThreads = Shape::kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slab = static_cast<int>(blockIdx.x), part = static_cast<int>(blockIdx.y);
  const int slice = quotient(warp, p.by_block_jobs);
  const int job = static_cast<int>(blockIdx.z) * p.block_jobs + warp - slice * p.block_jobs;
  const int first_unit = slab * p.c.slab_units;
  const int units = min(p.c.slab_units, p.c.channels / kUnitChannels - first_unit);
  const int of_tiles = quotient(job, p.by_chunks);
  const int first_tile = of_tiles * kTiles, first_pair = (job - of_tiles * p.chunks) * kPairs;
  const bool busy = slice < p.slices && job < p.jobs && first_tile < units;
  const int halves = p.h.taps * p.w.taps * p.c.group_units;

  const int begin = first_tile_of(p.tiles, part), end = first_tile_of(p.tiles, part + 1);
  const WgradShared layout(p);
  unsigned char* shared = dynamic_shared<unsigned char>();
  StagedPixel* listed_x = reinterpret_cast<StagedPixel*>(shared + p.buffers * layout.buffer_bytes);
  StagedPixel* listed_dz = listed_x + layout.staged_x;
  uint32_t* places = reinterpret_cast<uint32_t*>(listed_dz + layout.staged_dz);
  const auto buffer = [&](int tile) {
    return shared_address(shared) +
           static_cast<SharedAddress>((tile & 1 & (p.buffers - 1)) * layout.buffer_bytes);
  };
  const Plane source{p.h.source, p.w.source}, outputs{p.h.outputs, p.w.outputs};
  const auto stage = [&](int tile, const TilePlace& at) {
    const int image = at.image * p.tile.images, images = p.batch - image;
    stage_pixels<kThreads>(listed_x, layout.staged_x, images * p.halo.h * p.halo.w, p.x, source,
                           p.c.channels, first_unit, units, image,
                           at.row * p.halo.step_h + p.halo.first_h,
                           at.column * p.halo.step_w + p.halo.first_w, buffer(tile));
    stage_pixels<kThreads>(listed_dz, layout.staged_dz, images * p.tile.rows * p.tile.columns, p.dz,
                           outputs, p.c.channels, first_unit, units, image, at.row * p.tile.rows,
                           at.column * p.tile.columns,
                           buffer(tile) + static_cast<SharedAddress>(layout.halo_bytes));
    copy_async_commit();
  };
  list_halo<kThreads>(p.halo, p.tile.images, source, p.c.channels, listed_x);
  for_each_pixel<kThreads>(layout.staged_dz, p.by_tile, [&](int i, int image, int row, int column) {
    listed_dz[i] = {static_cast<uint32_t>(i * kPixelBytes),
                    ((image * outputs.rows + row) * outputs.columns + column) * p.c.channels,
                    row_column(row, column)};
  });
  __syncthreads();
  TilePlace next = place_of(p.tiles, begin);
  stage(begin, next);
  for_each_pixel<kThreads>(layout.padded, p.by_tile, [&](int i, int image, int row, int column) {
    const int line = min(image, p.tile.images - 1) * p.halo.h + row * p.h.stride;
    places[i] = static_cast<uint32_t>((line * p.halo.pitch + column) * kPixelBytes);
  });
  // Pixels that only fill up 16.
  const int filling = (layout.padded - layout.staged_dz) * (kPixelBytes / 4);
  for (int i = thread; i < filling * p.buffers; i += kThreads)
    store_shared(buffer(i / filling) +
                     static_cast<SharedAddress>(layout.halo_bytes + layout.staged_dz * kPixelBytes +
                                                i % filling * 4),
                 0);

  // What the lane addresses: of x one half of each pair, of one of 16 pixels; of dz another.
  const int group_unit = quotient(first_tile, p.c.by_group_units) * p.c.group_units;
  SharedAddress moved[kPairs];
#pragma unroll
  for (int m = 0; m < kPairs; ++m) {
    const int half = min((first_pair + m) * 2 + lane / 8 % 2, halves - 1);
    const int tap = quotient(half, p.c.by_group_units), unit = half - tap * p.c.group_units;
    const int r = quotient(tap, p.by_taps_w), s = tap - r * p.w.taps;
    uint32_t in_run = static_cast<uint32_t>(s * p.w.dilation);
    const int run = static_cast<int>(p.halo.by_scale.split(in_run));
    moved[m] = static_cast<SharedAddress>(
        (r * p.h.dilation * p.halo.pitch + run * p.halo.run + static_cast<int>(in_run)) *
            kPixelBytes +
        (group_unit + unit) * kUnitBytes);
  }
  const uint32_t* own_places = places + lane / 16 * 8 + lane % 8;
  const SharedAddress own_dz =
      static_cast<SharedAddress>(layout.halo_bytes + lane % 16 * kPixelBytes +
                                 (first_tile + (kTiles > 1 ? lane / 16 : 0)) * kUnitBytes);
  float sums[kPairs][kTiles][4];
#pragma unroll
  for (int m = 0; m < kPairs; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[m][n][e] = 0.0f;

  const int tile_pixels = p.tile.rows * p.tile.columns;
  for (int tile = begin; tile < end; ++tile) {
    copy_async_wait<0>();
    __syncthreads();
    const TilePlace at = next;
    if (tile + 1 < end) {
      advance(p.tiles, next);
      stage(tile + 1, next);
    }
    if (busy) {
      const SharedAddress staged = buffer(tile), staged_dz = staged + own_dz;
      const int rows = p.h.outputs - at.row * p.tile.rows;
      const int columns = p.w.outputs - at.column * p.tile.columns;
      const int pixels = min(p.tile.images, p.batch - at.image * p.tile.images) * tile_pixels;
      const bool whole = all_of(p.tile.rows <= rows, p.tile.columns <= columns);
      const Inside inside(0, rows, 0, columns);
      // Where no output is, dz counts as zero, and x may be anything.
      const auto multiply = [&](int first, bool some) {
        uint32_t mask[2];
        if (some) mask_pixels(mask, listed_dz, first, pixels, inside);
        uint32_t b[(kTiles + 1) / 2][4];
#pragma unroll
        for (int n = 0; n < kTiles; n += 2)
          load_matrices_transposed(b[n / 2], staged_dz + static_cast<SharedAddress>(
                                                             first * kPixelBytes + n * kUnitBytes));
        const SharedAddress pixel = staged + own_places[first];
#pragma unroll
        for (int m = 0; m < kPairs; ++m) {
          uint32_t a[4];
          load_matrices_transposed(a, pixel + moved[m]);
          if (some) a[0] &= mask[0], a[1] &= mask[0], a[2] &= mask[1], a[3] &= mask[1];
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
            mma<T>(sums[m][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
      };
      const int step = 16 * p.slices, unmasked = whole ? pixels / 16 * 16 : 0;
      int first = 16 * slice;
#pragma unroll 1
      for (; first < unmasked; first += step) multiply(first, false);
#pragma unroll 1
      for (; first < pixels; first += step) multiply(first, true);
    }
  }

  auto* slices = reinterpret_cast<Vector<float, 4>*>(shared);
  if (p.slices > 1) {
    __syncthreads();
    if (slice > 0 && busy) {
#pragma unroll
      for (int m = 0; m < kPairs; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          Vector<float, 4>& to =
              slices[(warp - p.block_jobs) * Shape::kVectors + (m * kTiles + n) * 32 + lane];
#pragma unroll
          for (int e = 0; e < 4; ++e) to.element[e] = sums[m][n][e];
        }
    }
    __syncthreads();
  }
  if (slice > 0 || !busy) return;
  auto* to = reinterpret_cast<Vector<float, 4>*>(p.sums) +
             ((int64_t{part} * p.c.slabs + slab) * p.jobs + job) * Shape::kVectors + lane;
#pragma unroll
  for (int m = 0; m < kPairs; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      Vector<float, 4> sum;
#pragma unroll
      for (int e = 0; e < 4; ++e) sum.element[e] = sums[m][n][e];
#pragma unroll 1
      for (int other = 1; other < p.slices; ++other) {
        const Vector<float, 4> more = slices[((other - 1) * p.block_jobs + warp) * Shape::kVectors +
                                             (m * kTiles + n) * 32 + lane];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum.element[e] += more.element[e];
      }
      to[(m * kTiles + n) * 32] = sum;
    }
}

// dw from the parts, four sums a thread: of `Lanes` threads every one adds its share of them.
inline constexpr int kAddThreads = 256;
template <typename T, typename Shape, int Lanes>
__global__ void __launch_bounds__(kAddThreads)
    add_grouped_parts(const __grid_constant__ GroupedWgrad p) {
  constexpr int kColumns = kAddThreads / Lanes;
  __shared__ Vector<float, 4> shared[Lanes][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, lane = thread / kColumns;
  const int size = p.c.slabs * p.jobs * Shape::kVectors;
  const int i = static_cast<int>(blockIdx.x) * kColumns + column;

  const int place = i % 32, n = i / 32 % Shape::kTiles, m = i / 32 / Shape::kTiles % Shape::kPairs;
  const int all_jobs = i / Shape::kVectors, slab = quotient(all_jobs, p.by_jobs);
  const int job = all_jobs - slab * p.jobs, of_tiles = quotient(job, p.by_chunks);
  const int first = slab * p.c.slab_units * kUnitChannels;
  const int filter_unit = of_tiles * Shape::kTiles + n;
  const int first_unit = quotient(filter_unit, p.c.by_group_units) * p.c.group_units;
  const int k = first + filter_unit * kUnitChannels + place % 4 * 2;
  const bool wanted = i < size && k < p.c.channels;
  const auto* sums = reinterpret_cast<const Vector<float, 4>*>(p.sums) + i;
  const Vector<float, 4> sum =
      sum_of_parts(sums, size, p.tiles.parts, wanted, lane, column, shared);
  if (!wanted || lane != 0) return;
  const int taps = p.h.taps * p.w.taps;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int half = ((job - of_tiles * p.chunks) * Shape::kPairs + m) * 2 + upper;
    const int tap = quotient(half, p.c.by_group_units);
    const int unit = first_unit + half - tap * p.c.group_units;
    const int c = first + unit * kUnitChannels + place / 4;
    if (tap >= taps) continue;
    const int group = quotient(c, p.by_group), in_group = c - group * p.c.group;
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (quotient(k + e, p.by_group) == group)
        static_cast<T*>(p.dw)[(int64_t{k + e} * taps + tap) * p.c.group + in_group] =
            from_wide<T>(sum.element[2 * upper + e]);
  }
}

template <typename T>
void run_grouped_wgrad(GroupedWgrad p, const Queue& queue) {
  with_wgrad_shape(p.c, [&](auto shape) {
    using Shape = decltype(shape);
    const int size = p.c.slabs * p.jobs * Shape::kVectors;
    p.sums = queue.scratch<float>(int64_t{p.tiles.parts} * size * 4);
    launch(grouped_wgrad_kernel<T, Shape>,
           dim3(static_cast<unsigned>(p.c.slabs), static_cast<unsigned>(p.tiles.parts),
                static_cast<unsigned>(p.job_blocks)),
           dim3(Shape::kThreads), WgradShared(p).bytes(p.buffers, slice_bytes<Shape>(p)), queue, p);
    const auto add = [&](auto kernel, int lanes) {
      launch(kernel, dim3(static_cast<unsigned>(ceil_div(size, kAddThreads / lanes))),
             dim3(kAddThreads), 0, queue, p);
    };
    if (p.tiles.parts > 8)
      add(add_grouped_parts<T, Shape, 32>, 32);
    else
      add(add_grouped_parts<T, Shape, 1>, 1);
  });
}

}  // namespace torchconv::cuda
