// The kernels of cutlass_sm90_*.cu that need CUTLASS's headers, for cutlass_sm90.cu, which does
// not. Pointers are on 16-byte boundaries.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/queue.h"

namespace torchconv::cuda::sm90 {

// What a gather reads and writes: output = clamp(sum + bias[k], low, high). bias may be null, and
// on any boundary.
struct GatherTensors {
  const void* image;
  const void* filters;
  const void* bias;
  void* output;
  float low, high;
};

void gather(DType dtype, const Gather& g, const GatherTensors& tensors, const Queue& queue);

// sums[i] = what split first + i contributes to dw, for `count` splits of s.
void wgrad_sums(const ConvProblem& p, const WgradSplits& s, int64_t first, int64_t count,
                const void* dz, const void* x, float* sums, const Queue& queue);

}  // namespace torchconv::cuda::sm90
