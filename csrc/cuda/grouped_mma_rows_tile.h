// What the kernels of grouped_mma_rows.h share: the items of a block, and how the rows of one come
// to the ring.
#pragma once

#include "cuda/grouped_mma_rows.h"
#include "cuda/grouped_mma_tile.h"
#include "cuda/tensor_core_of_8.h"

namespace torchconv::cuda {

// An item as it is looked up: its first image, its first column and row of outputs, and its rows.
struct RowsItem {
  int image, column, row, rows;
};
__device__ __forceinline__ RowsItem rows_item(const RowsCut& cut, int i) {
  uint32_t rest = static_cast<uint32_t>(i);
  const int row = static_cast<int>(cut.by_segments.split(rest)) * cut.rows;
  const int column = static_cast<int>(cut.by_tiles.split(rest)) * cut.columns;
  return {static_cast<int>(rest) * cut.images, column, row, min(cut.rows, cut.all_rows - row)};
}

// The units of a row that a thread copies: always of the same pixels of an item, in the order in
// which they are staged. Halved, the even columns of a line lie before the odd ones.
template <int Copies, int Threads, bool Halved>
class RowCopies {
 public:
  __device__ __forceinline__ explicit RowCopies(SharedAddress row)
      : to_(row +
            static_cast<SharedAddress>(static_cast<int>(threadIdx.x) / kSlabUnits * kPixelBytes +
                                       static_cast<int>(threadIdx.x) % kSlabUnits * kUnitBytes)) {}
  // For the item whose first pixel is column `column` of the image, which has rows x columns. line:
  // staged pixels of an image's row; channel: the thread's, units: those of the slab.
  __device__ __forceinline__ void begin(const RowsCut& cut, int line, const Divisor& by_line,
                                        int image, int column, int batch, int rows, int columns,
                                        int channels, int channel, int units) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < Copies; ++i) {
      uint32_t in_item = static_cast<uint32_t>(thread / kSlabUnits + i * kStep);
      int in_line = static_cast<int>(by_line.split(in_item));
      if (Halved) in_line = in_line <= cut.columns ? 2 * in_line : 2 * (in_line - cut.columns) - 1;
      const int own_image = image + static_cast<int>(in_item), own = column + in_line;
      from_[i] = own >= 0 && own < columns && own_image < batch
                     ? (own_image * rows * columns + own) * channels + channel
                     : kZeros;
      if (static_cast<int>(in_item) >= cut.images || thread % kSlabUnits >= units) from_[i] = kNone;
    }
  }
  // Of the row that is `row_at` elements after the image's first.
  template <typename T>
  __device__ __forceinline__ void copy(const T* image, int row_at, SharedAddress to) const {
#pragma unroll
    for (int i = 0; i < Copies; ++i)
      if (from_[i] != kNone)
        copy_async<16>(to_ + to + static_cast<SharedAddress>(i * kStep * kPixelBytes),
                       image + (from_[i] < 0 ? 0 : from_[i] + row_at), from_[i] >= 0);
  }

 private:
  static constexpr int kStep = Threads / kSlabUnits, kZeros = -1, kNone = -2;
  SharedAddress to_;
  int from_[Copies];  // in the image's first row
};

}  // namespace torchconv::cuda
