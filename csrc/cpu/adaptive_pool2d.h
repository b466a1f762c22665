// Adaptive pooling on the CPU, as csrc/ops calls it. Pointers are dense in the problem's layout.
// Where the windows divide evenly the kernels of ordinary pooling run.
#pragma once

#include "core/adaptive_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

void adaptive_avg_pool2d(const AdaptiveProblem& p, const void* x, void* y, const Parallel& pool);
// Every element of dx is written, here and below.
void adaptive_avg_pool2d_backward(const AdaptiveProblem& p, const void* dy, void* dx,
                                  const Parallel& pool);

// y and, where not null, the index h*W + w of each maximum: the first of equal ones, but the last
// of several NaN. Where the sizes do not divide, a window may span at most INT32_MAX elements.
void adaptive_max_pool2d(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
                         const Parallel& pool);
// dx[h,w] = sum of dy over the windows that selected (h,w). An index that names no element of its
// window may be ignored, and never leads outside dx.
void adaptive_max_pool2d_backward(const AdaptiveProblem& p, const void* dy, const int64_t* indices,
                                  void* dx, const Parallel& pool);
// The adjoint: y[p,q] = x at the index, 0 where that is no element.
void adaptive_max_pool2d_gather(const AdaptiveProblem& p, const void* x, const int64_t* indices,
                                void* y, const Parallel& pool);

}  // namespace torchconv::cpu
