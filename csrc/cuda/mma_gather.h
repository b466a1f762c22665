// Convolution as a matrix product on tensor cores whose A is gathered from an image: fprop, and
// dgrad, which is the same sum over the taps that hit with other steps.
//
//   out[pixel, o] = sum over taps (r, s) and channels c of
//       image[place of the pixel + r * (move_h, 0) + s * (0, move_w), c] * filter[o, r, s, c]
//
// A block computes a tile of pixels x outputs. The reduction runs over (r, s, c) flattened, so few
// channels waste nothing, and every thread stages one fixed unit of each slice for several rows:
// it finds the unit's tap once a slice, and of a row only whether the tap is inside the image. In
// dgrad of stride s every residue of pixel modulo s is a phase with taps of its own; the grid runs
// over all phases and no zero is multiplied.
//
// Groups are one more factor of the grid: each has channels, outputs and filters of its own.
//
// Bound: 2 * pixels * outputs * reduction operations, or, for few channels and short reductions,
// reading the image and writing the output once. The order of a sum is that of the flattened
// reduction, whatever the tile and the batch: a sample's bits depend on neither.
#pragma once

#include "cuda/activation.h"
#include "cuda/divmod.h"
#include "cuda/mma_tile.h"

namespace torchconv::cuda {

// One axis of the image. Backward: `source` are the positions of dz, `outputs` those of dx.
struct MmaAxis {
  int32_t source, outputs, taps, stride, dilation, pad;
  int32_t common;  // of stride and dilation, the greatest divisor
  int32_t phases;  // min(stride, outputs) backward, otherwise 1
};

struct GatherProblem {
  const void* image;    // batch x h.source x w.source x groups x channels
  const void* filters;  // filter (o, r, s, c) at o * pitch + r * line + s * column + c
  int64_t filter_pitch, filter_line, filter_column;
  int64_t filter_group;  // from one group's to the next
  int64_t batch;
  int32_t groups, channels, outputs;  // of a group
  MmaAxis h, w;
  bool backward;
  bool vectors;         // units of 16 bytes can be loaded from image and filters
  bool vector_outputs;  // and stored to what the epilogue writes
  Divisor channel_divisor;
  Divisor few_taps, more_taps;  // by w's taps of a phase: at least, and one more than that
  int32_t least_taps;
  uint32_t tiles_m, tiles_n;  // of one phase
};

template <typename T>
void run_gather(GatherProblem p, const Epilogue<T>& epilogue, const Queue& queue);
extern template void run_gather(GatherProblem, const Epilogue<Half>&, const Queue&);
extern template void run_gather(GatherProblem, const Epilogue<BFloat16>&, const Queue&);
extern template void run_gather(GatherProblem, const Epilogue<float>&, const Queue&);

}  // namespace torchconv::cuda
