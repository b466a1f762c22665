// The register tile of a convolution of channels_last images of few channels:
//
//   c[m*c_step + k] = clamp(bias[k] + before[m*c_step + k] +
//                           sum over rows r and terms t < run of
//                           src[m*pixel_step + r*src_row + t] * w[r*w_row + t*width + k])
//
// for m < pixels and filters k of at most kMaxVectors vectors; width is that of these vectors. The
// terms of a row of taps are neighbours, so that an element of the image is broadcast from where it
// lies, and taps outside of it are left out: nothing is copied.
#pragma once

#include <cstdint>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

struct TapRunTile {
  const float* src;  // what the first pixel reads first
  int64_t src_row, pixel_step;
  int64_t rows, run;
  const float* w;
  int64_t w_row;
  const float* bias;
  const float* before;  // null, or what is added, in rows as those of c
  float* c;
  int64_t c_step;
  int64_t lanes;  // of the last vector that exist in c
  bool stream;    // past the caches: every row of c aligned and its vectors whole
  bool clamp;     // to [0, most], with NaN kept
  float most;
};

using TapRunMicrokernel = void (*)(const TapRunTile&);

// 1 <= pixels <= kMaxRows, 1 <= vectors <= kMaxVectors.
TapRunMicrokernel tap_run_microkernel(int64_t pixels, int64_t vectors);

}  // namespace torchconv::cpu
