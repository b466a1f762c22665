// The exact passes of simt_*.cu where the device decides whether they are wanted: of the samples n
// with samples[n] != 0 alone, and of a weight gradient if *wanted != 0. What is not wanted is left
// as it is. Of float32 alone.
#pragma once

#include "core/conv_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

void simt_fprop_of(const int* samples, const ConvProblem& p, const void* x, const void* w,
                   const void* bias, const void* residual, void* y, void* preactivation,
                   const Queue& queue);
void simt_dgrad_of(const int* samples, const ConvProblem& p, const void* dz, const void* w,
                   void* dx, const Queue& queue);
void simt_wgrad_if(const int* wanted, const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue);

}  // namespace torchconv::cuda
