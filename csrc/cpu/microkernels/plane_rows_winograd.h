// The register kernels of depthwise convolution with pixels contiguous (NCHW) and a stride of 1 by
// minimal filtering down the columns of the kernel: two output rows at a time from the four sums of
// channel_columns_winograd.cpp, with vectors along the row. A pixel is transformed once for all
// columns of a large kernel: what a column makes of a vector is added up first and shifted then
// (Horner's scheme along the row), with the lanes that the vector before it pushed out. The weights
// are the products' operands in memory, a broadcast element each.
#pragma once

#include "cpu/microkernels/channel_columns_winograd.h"
#include "cpu/microkernels/plane_rows.h"

namespace torchconv::cpu {

// Source columns of the widest planes.
inline constexpr int64_t kMostWinogradColumns = 1024;

struct PlaneRowsWinograd {
  PlaneRowsSum<float> sum;  // weights: a plane's are those of plane_rows_weights
  const float* src_end;     // of all planes that there are
};

// R = 5 or 7; rows of 5 are longer than a vector. Neither dilation nor a step, and from none to all
// but one of the kernel's columns lie left of the source. False where a sum is not finite: the
// planes are then not to be trusted.
bool plane_rows_winograd(const PlaneRows& shape, const PlaneRowsWinograd& planes);

// From taps that lie `row` and `column` apart to [products][R], and a vector at most of no use.
void plane_rows_weights(int64_t R, const float* taps, int64_t row, int64_t column, float* weights);

}  // namespace torchconv::cpu
