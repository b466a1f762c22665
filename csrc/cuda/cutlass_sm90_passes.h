// The kernels of cutlass_sm90_*.cu that need CUTLASS's headers, for cutlass_sm90.cu, which does
// not. Pointers are on 16-byte boundaries.
#pragma once

#include "cuda/cutlass_sm90_limits.h"
#include "cuda/queue.h"

namespace torchconv::cuda::sm90 {

// What a gather reads and writes: output = clamp(sum + bias[k] + residual, low, high), where bias
// may be on any boundary, and the residual lies as the output does. Either may be null.
struct GatherTensors {
  const void* image;
  const void* filters;
  const void* bias;
  const void* residual;
  void* output;
  float low, high;
};

void gather_half(const Gather& g, const GatherTensors& tensors, const Queue& queue);
void gather_bfloat16(const Gather& g, const GatherTensors& tensors, const Queue& queue);
void gather_tf32(const Gather& g, const GatherTensors& tensors, const Queue& queue);
void gather_with_halo(DType dtype, const Gather& g, const GatherTensors& tensors,
                      const Queue& queue);

inline void gather(DType dtype, const Gather& g, const GatherTensors& tensors, const Queue& queue) {
  switch (dtype) {
    case DType::kFloat16:
      return gather_half(g, tensors, queue);
    case DType::kBFloat16:
      return gather_bfloat16(g, tensors, queue);
    default:
      return gather_tf32(g, tensors, queue);
  }
}

// The parts of dw, each in its slot of `sums`, splits times K x R x S x C.
void wgrad_parts(const ConvProblem& p, const WgradShares& s, const void* dz, const void* x,
                 float* sums, const Queue& queue);

// The parts of dw in TF32, each in its slot of `sums`: dz is K x s.pitch, transposed.
void wgrad_tf32_parts(const ConvProblem& p, const WgradTf32Shares& s, const void* dz, const void* x,
                      float* sums, const Queue& queue);

}  // namespace torchconv::cuda::sm90
