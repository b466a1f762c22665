// The convolution by plain loops in 64-bit arithmetic: for what the tiles of simt_*.cu would leave
// mostly empty (a few channels a group), for integers, and for sizes beyond 32-bit coordinates.
#pragma once

#include "core/conv_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

void simt_direct_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                       const void* residual, void* y, void* preactivation, const Queue& queue);
void simt_direct_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                       const Queue& queue);
void simt_direct_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                       const Queue& queue);

}  // namespace torchconv::cuda
