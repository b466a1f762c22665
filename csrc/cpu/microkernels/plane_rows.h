// The register kernels of depthwise convolution with pixels contiguous (NCHW). Vectors lie along a
// row; a strip, one vector wide, is walked from the top of a plane to its bottom. Every source row
// is loaded once, shifted once for each column of the kernel, and feeds all output rows that it
// reaches, whose sums are in registers and roll on from row to row (register reuse in the manner of
// Zhang et al., "High Performance Depthwise and Pointwise Convolutions on Mobile Devices", AAAI
// 2020). The weight gradient is the same walk with the sums of the taps in registers and the rows
// of dz rolling. Left and right of a row lanes are masked, above and below it rows are left out.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

// Square kernels, and how their taps meet a source plane: R = 3, 5 or 7 with a step of 1 or 2 (the
// latter not of plane_rows_dot with 7). Without dilation plane_rows_steps has the others up to 7,
// and steps up to 4: for plane_rows_dot where a row of the kernel takes few steps
// (kMostStepsTerms).
struct PlaneRows {
  // kSpread is the gradient of a stride of 2: output (h, w) sums the sources ((h + pad_h - r) / 2,
  // (w + pad_w - s) / 2) of the taps where these are whole. Else output (i, j) sums the sources
  // (i*step + r, j*step + s*dilation), from where src and the borders count.
  enum Step : uint8_t { kOne = 1, kTwo, kThree, kFour, kSpread };

  int64_t R;
  Step step;
  int64_t pitch, dilation;
  int64_t top, bottom, left, right;  // the source has rows [top, bottom), columns [left, right)
  int64_t pad_h, pad_w;              // of kSpread, where R/2 and pad_w are both even or both odd
  int64_t columns;                   // of an output row
};

// Output rows [first, last) of some planes.
template <typename A>
struct PlaneRowsSum {
  const A* src;
  A* out;
  const A* weights;
  const A* bias;  // one a plane, or null
  int64_t planes, src_plane, out_plane, weight_plane;
  int64_t weight_row, weight_column;
  int64_t out_pitch, first, last;
  int64_t ahead;  // sources that many elements on are fetched from memory, where not 0
  bool streams;   // past the caches, where whole vectors are aligned
  bool clamps;    // the outputs, to [0, most]; not with kSpread
  A most;

  template <int N>
  TORCHCONV_INLINE typename Vec<A, N>::Type clamped(typename Vec<A, N>::Type v) const {
    return clamps ? cpu::clamped(v, Vec<A, N>::broadcast(most)) : v;
  }
};
template <typename A>
void plane_rows_sum(const PlaneRows& shape, const PlaneRowsSum<A>& sum);

// totals[R*R] += dz * src over output rows [first, last) and strips [begin, end) of some planes of
// each channel.
template <typename A>
struct PlaneRowsDot {
  const A* src;
  const A* dz;
  double* totals;
  int64_t channels, src_channel, dz_channel;
  int64_t planes, src_plane, dz_plane;
  int64_t dz_pitch, first, last, begin, end;
  int64_t src_ahead, dz_ahead;  // as of PlaneRowsSum
};
template <typename A>
void plane_rows_dot(const PlaneRows& shape, const PlaneRowsDot<A>& dot);

// Lanes of a strip.
template <typename A>
int64_t plane_rows_lanes(const PlaneRows& shape);

}  // namespace torchconv::cpu
