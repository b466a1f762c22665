// How Winograd's algorithm cuts an image, and what its transforms read and write.
//
// A tile is 4 x 4 outputs (of the weight's gradient: of z), whose 6 x 6 inputs overlap those of the
// next. Where that fits better, tiles have three rows or columns of outputs: only the fourth needs
// the products with infinity along that axis, so they are left out. The tiles of some samples, a
// piece, are one list, in which those with a product are neighbours: first the tall and narrow ones
// of all samples, then the tall and wide, the short and wide, the short and narrow.
//
//   U [point][channel][filter]                      transformed weights
//   V [point][channel][tile], or [point][tile][channel] where tiles are the terms of the products
//   M [point][filter][tile], or [point][tile][filter] where channels are innermost in the target
#pragma once

#include "cuda/activation.h"
#include "cuda/divmod.h"
#include "cuda/simt_view.h"
#include "cuda/winograd_transforms.h"

namespace torchconv::cuda::winograd {

// What of a list has a product with point p: a range.
struct TileRanges {
  int count, tall_end, wide_begin, wide_end;

  __host__ __device__ __forceinline__ int begin(int point) const {
    return point % kPoints == kPoints - 1 ? wide_begin : 0;
  }
  __host__ __device__ __forceinline__ int end(int point) const {
    if (point / kPoints == kPoints - 1) return tall_end;
    return point % kPoints == kPoints - 1 ? wide_end : count;
  }
};

// A tile: its sample, the first of its outputs, and how many it has along each axis.
struct Place {
  int64_t n;
  int i, j, rows, columns;
};

// A piece: the tiles of some samples, or of one from tile `first` on, which then are all of four
// rows and columns.
struct Tiles {
  int64_t first_sample;
  uint32_t first;
  TileRanges ranges;
  int tall, wide;  // rows of tall tiles and columns of wide ones in a sample
  Divisor tall_rows, short_rows, wide_columns, narrow_columns;

  __device__ __forceinline__ Place place(int tile) const {
    const bool is_tall = tile < ranges.tall_end;
    const bool is_wide = tile >= ranges.wide_begin && tile < ranges.wide_end;
    const int begin = is_tall   ? (is_wide ? ranges.wide_begin : 0)
                      : is_wide ? ranges.tall_end
                                : ranges.wide_end;
    uint32_t rest = first + static_cast<uint32_t>(tile - begin);
    const int column = static_cast<int>((is_wide ? wide_columns : narrow_columns).split(rest));
    const int row = static_cast<int>((is_tall ? tall_rows : short_rows).split(rest));
    return {first_sample + rest, is_tall ? kOutputs * row : kOutputs * tall + (kOutputs - 1) * row,
            is_wide ? kOutputs * column : kOutputs * wide + (kOutputs - 1) * column,
            is_tall ? kOutputs : kOutputs - 1, is_wide ? kOutputs : kOutputs - 1};
  }
};

// What is cut.
struct Image {
  const float* data;
  SimtStrides strides;
  int channels, rows, columns;
  int first_row, first_column;  // of the input of tile (0, 0)
};

// Where a transform's results go: point, channel and tile have these strides.
struct Panels {
  float* data;
  int64_t point, channel, tile;
};

// V = B^T d B of 6 x 6 inputs; and G g G^T of 4 x 4 gradients, and zero in *flag. `terms`: whether
// tiles are the terms.
void transform_sources(const Image& image, const Tiles& tiles, bool terms, const Panels& v,
                       const Queue& queue);
void transform_gradients(const Image& image, const Tiles& tiles, const Panels& v, int* flag,
                         const Queue& queue);

// Strides of the weights by target channel m, source channel c and tap; `from` is the tap (0, 0).
struct Weights {
  const float* data;
  int M, C;
  int64_t from, m, c, row, column;
};

// U, rows of `width`; and zeros in `flags`, of which there are `count`.
void transform_weights(const Weights& w, float* u, int64_t width, int* flags, int64_t count,
                       const Queue& queue);

// What an output transform writes.
struct Target {
  SimtStrides strides;
  int channels, rows, columns;
};

// y = g(A^T M A + ..). Sets flags[n] where a sum of sample n is infinite or NaN. M: its strides by
// point, channel and tile.
void transform_outputs(const Panels& m, const Tiles& tiles, const Target& target,
                       const Epilogue<float>& epilogue, int* flags, const Queue& queue);

// dw from sums [slice][point][filter][width of channels]. Sets *flag where one is infinite or NaN.
struct WeightGradient {
  const float* sums;
  int64_t slice, point, width;
  int slices, K, C;
  bool flip;
  SimtWeightStrides strides;
  float* dw;
};
void transform_weight_gradients(const WeightGradient& p, int* flag, const Queue& queue);
}  // namespace torchconv::cuda::winograd
