// The transforms of x and dz for the weight gradient in Winograd's domain: from segments of tiles
// into planes [value][panel][tile][kPanel], vectors along channels.
#pragma once

#include "cpu/conv_view.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/winograd_wgrad_tiles.h"

namespace torchconv::cpu::winograd_gradient {

// x or dz. Channels are neighbours in memory, or pixels are, or the channels of a vector are.
template <typename A>
struct Operand {
  const A* data;
  ConvStrides stride;  // stride.c: of channels; not read where channels are blocked
  int64_t vector;      // stride of vectors of channels
  int64_t channels;
  int64_t top, left;           // element of dz's (0, 0) and the first tap
  int64_t step_h, step_w;      // elements from one gradient to the next
  int64_t spread_h, spread_w;  // elements from one tap to the next: the dilation
  int64_t rows, columns;       // elements outside count as zero
  A* planes;
  int64_t plane, panel;  // strides
  bool streams = false;  // the stores to them: stream_fence() after the last
};

// Scratch of one task: a band of columns after the first transform, and one of transposed pixels.
template <typename A>
struct Bands {
  int64_t row;  // elements; the rows fall into different sets of a cache
  int64_t size;
  Bands(int64_t values, int64_t columns)
      : row((columns | 1) * kLanes<A>), size(2 * values * row + kLanes<A> * kLanes<A>) {}
};

// Channels [v*lanes, (v + 1)*lanes) of the segment's tiles. `next` is the segment that follows,
// which is fetched into cache. band: Bands::size elements.
template <typename Scheme, typename A>
void transform_source(const Operand<A>& x, const Segment& now, const Segment& next, int64_t v,
                      const Bands<A>& bands, A* band);
template <typename Scheme, typename A>
void transform_gradient(const Operand<A>& dz, const Segment& now, const Segment& next, int64_t v,
                        const Bands<A>& bands, A* band);

// pixels[i][lane] for `count` neighbouring pixels of n channels; up to a vector of pixels beyond is
// overwritten. Prefetches the same pixels `ahead` elements on.
template <typename A>
void transpose_pixels(const A* src, int64_t channel_stride, int64_t n, int64_t count, int64_t ahead,
                      A* pixels);

}  // namespace torchconv::cpu::winograd_gradient
