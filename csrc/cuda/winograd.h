// Winograd's algorithm in exact float32, of 3x3 kernels of step 1, one group and enough channels on
// both sides (compute capability 8.0 and later). What conv_passes.h says of algorithms holds here.
#pragma once

#include "cuda/conv_passes.h"

namespace torchconv::cuda {

bool winograd_takes(const ConvProblem& p, Pass pass, const Queue& queue);
// Those of the matrix products.
double winograd_operations(const ConvProblem& p, Pass pass);
void winograd_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                    const void* residual, void* y, void* preactivation, const Queue& queue);
void winograd_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                    const Queue& queue);
void winograd_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                    const Queue& queue);

}  // namespace torchconv::cuda
