// What the kernels of grouped_mma.h share: tiles of outputs, the tables that say where their pixels
// are, and how a slab of pixels comes to shared memory.
#pragma once

#include "core/range.h"
#include "cuda/grouped_mma.h"
#include "cuda/tensor_core.h"

namespace torchconv::cuda {

__host__ __device__ __forceinline__ int round_up_int(int a, int b) { return (a + b - 1) / b * b; }

__device__ __forceinline__ int quotient(int n, const Divisor& by) {
  return static_cast<int>(by.quotient(static_cast<uint32_t>(n)));
}

// The sum over parts of four floats, `size` fours apart from one part to the next: each of Lanes
// rows of threads adds its share, and the first row has the sum. All threads of a block call it.
template <int Lanes, int Columns>
__device__ __forceinline__ Vector<float, 4> sum_of_parts(
    const Vector<float, 4>* sums, int size, int parts, bool wanted, int lane, int column,
    Vector<float, 4> (&shared)[Lanes][Columns]) {
  Vector<float, 4> sum{};
  const auto add = [&](const Vector<float, 4>& more) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum.element[e] += more.element[e];
  };
  if (wanted)
#pragma unroll 8
    for (int part = lane; part < parts; part += Lanes) add(sums[int64_t{part} * size]);
  if constexpr (Lanes > 1) {
    shared[lane][column] = sum;
    __syncthreads();
    if (lane == 0)
#pragma unroll 4
      for (int other = 1; other < Lanes; ++other) add(shared[other][column]);
  }
  return sum;
}

// Units of outputs that one warp computes at once, all of one group.
inline int outputs_at_once(const GroupedChannels& c) {
  return c.group_units % 4 == 0 ? 4 : c.group_units % 2 == 0 ? 2 : 1;
}

// Row and column of a pixel in 15 bits each, below a bit that takes the borrow of a comparison.
using RowColumn = uint32_t;
inline constexpr RowColumn kBorrows = 0x80008000u;
inline constexpr int kMostRows = 0x7FFF;
inline constexpr RowColumn kNoPixel = 0x7FFF7FFFu;  // is inside nothing
__device__ __forceinline__ RowColumn row_column(int row, int column) {
  return static_cast<RowColumn>(row) << 16 | static_cast<RowColumn>(column);
}

// The rows and columns of a table that are inside the image, for one tile.
struct Inside {
  RowColumn from_first, to_last;  // what is added to and subtracted from, with bits for borrows
  __device__ __forceinline__ Inside(int first_row, int rows, int first_column, int columns)
      : from_first(kBorrows - row_column(clamped(first_row), clamped(first_column))),
        to_last(kBorrows + row_column(clamped(rows - 1), clamped(columns - 1))) {
    if (rows <= 0 || columns <= 0) from_first = 0;  // leaves no bit
  }
  __device__ __forceinline__ bool has(RowColumn at) const {
    return ((at + from_first) & (to_last - at) & kBorrows) == kBorrows;
  }

 private:
  static __device__ __forceinline__ int clamped(int a) { return min(max(a, 0), kMostRows - 1); }
};

// A pixel that is staged: its place in the buffer in bytes, how many elements it is after a tile's
// first pixel, and its row and column there.
struct alignas(16) StagedPixel {
  uint32_t to;
  int32_t from;
  RowColumn at;
};

// An output of a tile's list: how many elements it is after the tile's first, and its row, of all
// images', and column there.
struct alignas(8) StoredPixel {
  int32_t to;
  RowColumn at;
};

// An image's pixels as a table is to have them.
struct Plane {
  int32_t rows, columns;
};

// Calls f(i, image, row, column) for the block's pixels of images x rows x columns, each by one
// thread.
template <int Threads, typename F>
__device__ __forceinline__ void for_each_pixel(int count, const PixelDivisors& by, F&& f) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += Threads) {
    uint32_t rest = static_cast<uint32_t>(i);
    const int column = static_cast<int>(by.columns.split(rest));
    const int row = static_cast<int>(by.rows.split(rest));
    f(i, static_cast<int>(rest), row, column);
  }
}

// The table of a halo, images x h x w.
template <int Threads>
__device__ __forceinline__ void list_halo(const Halo& halo, int images, const Plane& source,
                                          int channels, StagedPixel* table) {
  for_each_pixel<Threads>(
      images * halo.h * halo.w, halo.divisors, [&](int i, int image, int row, int column) {
        uint32_t in_run = static_cast<uint32_t>(column);
        const int run = static_cast<int>(halo.by_scale.split(in_run));
        table[i] = {static_cast<uint32_t>(((image * halo.h + row) * halo.pitch + run * halo.run +
                                           static_cast<int>(in_run)) *
                                          kPixelBytes),
                    ((image * source.rows + row) * source.columns + column) * channels,
                    row_column(row, column)};
      });
}

// The place of a tile, in tiles.
struct TilePlace {
  int image, row, column;
};
__device__ __forceinline__ int first_tile_of(const TileParts& tiles, int part) {
  return part * tiles.least + min(part, tiles.longer);
}
__device__ __forceinline__ TilePlace place_of(const TileParts& tiles, int i) {
  uint32_t rest = static_cast<uint32_t>(i);
  const int column = static_cast<int>(tiles.by.columns.split(rest));
  const int row = static_cast<int>(tiles.by.rows.split(rest));
  return {static_cast<int>(rest), row, column};
}
__device__ __forceinline__ void advance(const TileParts& tiles, TilePlace& at) {
  if (++at.column < tiles.columns) return;
  at.column = 0;
  if (++at.row < tiles.rows) return;
  at.row = 0, ++at.image;
}

// Starts the copies of a table's pixels; zeros outside the image, which a tile's first pixel at
// (image, row, column) may be too.
template <int Threads>
__device__ __forceinline__ void stage_pixels(const StagedPixel* table, int count, int valid,
                                             const void* source, const Plane& plane, int channels,
                                             int first_unit, int units, int image, int row,
                                             int column, SharedAddress to) {
  const int thread = static_cast<int>(threadIdx.x), unit = thread % kSlabUnits;
  if (unit >= units) return;
  const int64_t first = ((int64_t{image} * plane.rows + row) * plane.columns + column) * channels +
                        (first_unit + unit) * kUnitChannels;
  const uint64_t from = reinterpret_cast<uint64_t>(source) + static_cast<uint64_t>(2 * first);
  const Inside inside(-row, plane.rows - row, -column, plane.columns - column);
  to += static_cast<SharedAddress>(unit * kUnitBytes);
#pragma unroll 4
  for (int i = thread / kSlabUnits; i < count; i += Threads / kSlabUnits) {
    const StagedPixel pixel = table[i];
    copy_async<16>(
        to + pixel.to,
        reinterpret_cast<const void*>(from + static_cast<uint64_t>(2 * int64_t{pixel.from})),
        i < valid && inside.has(pixel.at));
  }
}

// Stages the filters of `units` units of outputs from first_unit on.
template <int Threads, typename Problem>
__device__ __forceinline__ void stage_filters(const Problem& p, int first_unit, int units,
                                              unsigned char* to) {
  const int taps = p.h.taps * p.w.taps, group = p.c.group;
  const int cells = taps * p.c.group_units;  // of 16 bytes, of a filter
  const uint16_t* filters =
      static_cast<const uint16_t*>(p.filters) + int64_t{first_unit} * kUnitChannels * taps * group;
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < units * kUnitChannels * cells; i += Threads) {
    const int filter = quotient(i, p.by_cells);
    unsigned char* const own = to + filter * p.filter_bytes + (i - filter * cells) * kUnitBytes;
    if (group >= kUnitChannels) {
      copy_async<16>(shared_address(own), filters + i * kUnitChannels, true);
      continue;
    }
    const uint16_t* const weights = filters + i * group;
    uint64_t own_weights;
    if (group == 4) {
      own_weights = *reinterpret_cast<const uint64_t*>(weights);
    } else if (group == 2) {
      own_weights = *reinterpret_cast<const uint32_t*>(weights);
    } else {
      own_weights = *weights;
    }
    const int before = filter & (kUnitChannels - 1) & -group;  // channels of earlier groups
    own_weights <<= before % 4 * 16;
    *reinterpret_cast<Vector<uint64_t, 2>*>(own) = {
        {before < 4 ? own_weights : 0, before < 4 ? 0 : own_weights}};
  }
}

}  // namespace torchconv::cuda
