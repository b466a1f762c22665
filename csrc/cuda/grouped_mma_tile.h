// What the kernels of grouped_mma.h share: tiles of octets, and slabs of pixels in shared memory.
#pragma once

#include "core/range.h"
#include "cuda/grouped_mma.h"
#include "cuda/mma_tile.h"

namespace torchconv::cuda {

__host__ __device__ __forceinline__ int round_up_int(int a, int b) { return (a + b - 1) / b * b; }

// Units of outputs that one warp computes at once, all of one group.
inline int outputs_at_once(const GroupedChannels& c) {
  return c.group_units % 4 == 0 ? 4 : c.group_units % 2 == 0 ? 2 : 1;
}

inline constexpr int kGatherWarps = 8;  // of a block, forward and of dx

// Bytes of shared memory, in the order of the kernel.
inline int grouped_gather_shared(const GroupedGather& p) {
  const int octets = round_up_int(p.tile.images * p.tile.rows * p.tile.octets, 8);
  return 2 * p.buffer_bytes + octets * (8 * kPixelBytes + 16) + p.c.slab_units * p.steps * 256 +
         2 * p.steps * 8;
}

// The same of the weights' gradient, whose warps have kWgradPairs pairs of halves each.
inline constexpr int kWgradPairs = 5;
inline int grouped_wgrad_shared(const GroupedWgrad& p) {
  const int octets = round_up_int(p.tile.images * p.tile.rows * p.tile.octets, 2);
  return 2 * (p.halo_bytes + octets * 8 * kPixelBytes) + octets * 16;
}

// An axis as the forward pass moves along it.
struct StagedAxis {
  int32_t taps, move, scale;
};
__host__ __device__ __forceinline__ StagedAxis staged(const MmaAxis& axis) {
  return {axis.taps, axis.dilation, axis.stride};
}

// The pixels that one image's outputs of a tile reach: lines, and columns in as many runs as
// neighbouring outputs are pixels apart.
struct Halo {
  int32_t h, w, run;  // of columns w, in runs
  int32_t pitch;      // pixels of a staged line
};
template <typename Axis>
__host__ __device__ __forceinline__ Halo halo_of(const OctetTile& tile, const Axis& h,
                                                 const Axis& w) {
  const auto reach = [](int outputs, const Axis& a) {
    return (outputs - 1) * a.scale + (a.taps > 1 ? (a.taps - 1) * a.move : 0) + 1;
  };
  const int columns = reach(tile.octets * 8, w);
  const int run = (columns + w.scale - 1) / w.scale;
  return {reach(tile.rows, h), columns, run, run * w.scale};
}

// An octet's pixel in a staged halo, and where it is in the tile; or a tile's place in the batch.
struct alignas(16) OctetPlace {
  int32_t pixel, image, row, column;
};

// Octets that only fill up a warp's work are below every image.
__device__ __forceinline__ OctetPlace octet_of(const OctetTile& tile, const Halo& halo, int scale_h,
                                               int i) {
  const int line = i / tile.octets, octet = i - line * tile.octets;
  const int image = line / tile.rows, row = line - image * tile.rows;
  if (image >= tile.images) return {0, 0, 1 << 30, 0};
  return {(image * halo.h + row * scale_h) * halo.pitch + octet * 8, image, row, octet * 8};
}

// All tiles of a batch of planes.
class OctetTiles {
 public:
  __host__ __device__ __forceinline__ OctetTiles(const OctetTile& tile, int batch, int rows,
                                                 int columns)
      : tile_(tile),
        columns_((columns + tile.octets * 8 - 1) / (tile.octets * 8)),
        rows_((rows + tile.rows - 1) / tile.rows),
        count_((batch + tile.images - 1) / tile.images * rows_ * columns_) {}
  __host__ __device__ __forceinline__ int count() const { return count_; }
  __device__ __forceinline__ int part_begin(int part, int parts) const {
    return static_cast<int>(int64_t{count_} * part / parts);
  }
  __device__ __forceinline__ OctetPlace place(int i) const {
    const int line = i / columns_, images = line / rows_;
    return {0, images * tile_.images, (line - images * rows_) * tile_.rows,
            (i - line * columns_) * tile_.octets * 8};
  }

 private:
  OctetTile tile_;
  int columns_, rows_, count_;
};

// The bytes by which a tap moves an output's pixel.
__device__ __forceinline__ int move_in_halo(const Halo& halo, const Divisor& scale_w, int rows,
                                            int columns) {
  uint32_t column = static_cast<uint32_t>(columns);
  const int run = static_cast<int>(scale_w.split(column));
  return (rows * halo.pitch + run * halo.run + static_cast<int>(column)) * kPixelBytes;
}

// A slab of an image.
struct Slab {
  const unsigned char* image;
  int32_t batch, rows, columns, channels, first_unit, units;
};

// Starts the copies of a halo, whose lines are those of `images` images, from (n, y, x) on; zeros
// outside the image.
template <int Warps>
__device__ __forceinline__ void stage_slab(const Slab& from, SharedAddress to, int images,
                                           const Halo& halo, const Divisor& scale_w, int n, int y,
                                           int x) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, unit = lane % 8;
  if (unit >= from.units) return;
  const uint64_t image_bytes = reinterpret_cast<uint64_t>(from.image) +
                               static_cast<uint64_t>((from.first_unit + unit) * kUnitBytes);
  for (int line = thread / 32; line < images * halo.h; line += Warps) {
    const int image = images > 1 ? line / halo.h : 0, row = y + line - image * halo.h;
    const bool inside = all_of(n + image < from.batch, within(row, from.rows));
    // In elements; what is inside the image fits.
    const uint32_t source =
        static_cast<uint32_t>(((n + image) * from.rows + row) * from.columns + x) *
        static_cast<uint32_t>(from.channels);
    const SharedAddress to_line =
        to + static_cast<SharedAddress>(line * halo.pitch * kPixelBytes + unit * kUnitBytes);
#pragma unroll 2
    for (int column = lane / 8; column < halo.w; column += 4)
      copy_async<16>(
          to_line + static_cast<SharedAddress>(move_in_halo(halo, scale_w, 0, column)),
          reinterpret_cast<const void*>(
              image_bytes + 2 * uint64_t{source + static_cast<uint32_t>(column * from.channels)}),
          all_of(inside, within(x + column, from.columns)));
  }
}

}  // namespace torchconv::cuda
