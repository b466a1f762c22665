// Grouped convolution of 3 x 3 taps on tensor cores, for 16-bit types in NHWC: the forward pass and
// the gradient by x, of strides 1 and 2 and groups of 1, 2, 4, 8, 16, 32 or 64 channels; and the
// gradient by the weights, of groups of 16 at most.
// Channels come in units and slabs, as grouped_mma.h has them.
//
// A block walks down the rows of a few columns of outputs, those of several images where planes are
// narrow. Rows of the source come to a ring in shared memory, some steps ahead. A warp computes two
// units of outputs and keeps all of their filters in registers; a row's pixels it loads once for
// each tap of a line and multiplies for all rows of outputs that want them, which are in registers
// too until they are whole. So shared memory is met once where it would be met three times, and
// outputs go straight to memory: two units are a sector of 32 bytes.
//
// Bound: reading the image and writing the output once; of wide groups, products.
#pragma once

#include "cuda/grouped_mma.h"

namespace torchconv::cuda {

// Stride 1; stride 2 forward, whose rows are the source's halved; stride 2 backward.
enum class RowWalk { kSame, kHalved, kDoubled };

// An item of a block is rows x columns of outputs of some images; of stride 2 backward, two by two.
// All items are in as many parts as there are blocks for a slab, the first `longer` of one more.
struct RowsCut {
  int32_t images, columns, rows, all_rows, all_columns;
  int32_t tiles, segments;  // of columns, of rows
  int32_t parts, least, longer;
  int32_t line;        // pixels of an image's row as staged
  int32_t row_bytes;   // of all images' rows
  int32_t slot_bytes;  // of a step
  Divisor by_line, by_columns, by_tiles, by_segments;

  // The first item of a part, which ends where the next begins.
  __host__ __device__ __forceinline__ int first_item(int part) const {
    return part * least + (part < longer ? part : longer);
  }
};

struct GroupedRows {
  const void* image;
  const void* filters;
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  bool backward;
  RowsCut cut;
  int32_t first_h, first_w;  // of the source, for the first output
  int32_t filter_bytes;
  Divisor by_cells;
};

// False where the kernels do not take the problem.
bool plan_grouped_rows(GroupedRows& p, const Queue& queue);

template <typename T>
void run_grouped_rows(const GroupedRows& p, const Epilogue<T>& epilogue, const Queue& queue);
extern template void run_grouped_rows(const GroupedRows&, const Epilogue<Half>&, const Queue&);
extern template void run_grouped_rows(const GroupedRows&, const Epilogue<BFloat16>&, const Queue&);

// The gradient by the weights: both kernels of the pass.
struct GroupedRowsWgrad {
  const void* dz;
  const void* x;
  float* sums;  // parts x dw
  void* dw;
  GroupedChannels c;
  int32_t batch;
  MmaAxis h, w;
  RowsCut cut;
  int32_t dz_at;  // in a step's bytes
  Divisor by_group;
};

bool plan_grouped_rows_wgrad(GroupedRowsWgrad& p, const Queue& queue);

template <typename T>
void run_grouped_rows_wgrad(GroupedRowsWgrad p, const Queue& queue);
extern template void run_grouped_rows_wgrad<Half>(GroupedRowsWgrad, const Queue&);
extern template void run_grouped_rows_wgrad<BFloat16>(GroupedRowsWgrad, const Queue&);

}  // namespace torchconv::cuda
