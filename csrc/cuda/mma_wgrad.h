// The gradient by the weights as a matrix product on tensor cores:
//
//   dw[k, (r, s, c)] = sum over pixels (n, p, q) of dz[pixel, k] * x[place of the pixel + tap, c]
//
// A block computes a tile of filters x weights of a filter, (r, s, c) flattened, over one part of
// the pixels; both operands are rows of NHWC memory, one for each pixel, and ldmatrix turns them.
// A thread stages one fixed unit of a row, whose tap it finds once; one warp splits each pixel into
// its coordinates, a slice ahead. Parts leave float32 sums in scratch, which a second kernel adds
// in order. A part adds its sums there every kChainPixels pixels, because the hardware truncates
// where it adds: a longer chain would err by more than float32 does.
//
// Bound: 2 * pixels * K * R * S * C operations. Parts are as many as fill a large device, by the
// shape alone: the bits of dw do not depend on the device.
#pragma once

#include "cuda/divmod.h"
#include "cuda/mma_tile.h"

namespace torchconv::cuda {

struct WgradProblem {
  const void* dz;  // pixels x filters
  const void* x;   // N x H x W x channels
  float* sums;     // parts x filters x pitch
  void* dw;        // filters x weights
  int64_t pixels, part_pixels;
  int32_t channels, H, W, filters, weights, pitch;
  int32_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  uint32_t parts, tiles_m, tiles_n;
  Divisor plane, line;  // by P * Q and Q
  Divisor channel_divisor, tap_divisor;
  bool vectors_dz, vectors_x;  // units of 16 bytes can be loaded
};

template <typename T>
void run_wgrad(WgradProblem p, const Queue& queue);
extern template void run_wgrad<Half>(WgradProblem, const Queue&);
extern template void run_wgrad<BFloat16>(WgradProblem, const Queue&);
extern template void run_wgrad<float>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
