// Adaptive pooling on the GPU, as csrc/ops calls it: what csrc/cpu/adaptive_pool2d.h says of the
// CPU's holds here. Pointers are device memory, dense in the problem's layout.
#pragma once

#include "core/adaptive_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

void adaptive_avg_pool2d(const AdaptiveProblem& p, const void* x, void* y, const Queue& queue);
void adaptive_avg_pool2d_backward(const AdaptiveProblem& p, const void* dy, void* dx,
                                  const Queue& queue);
void adaptive_max_pool2d(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
                         const Queue& queue);
void adaptive_max_pool2d_backward(const AdaptiveProblem& p, const void* dy, const int64_t* indices,
                                  void* dx, const Queue& queue);
void adaptive_max_pool2d_gather(const AdaptiveProblem& p, const void* x, const int64_t* indices,
                                void* y, const Queue& queue);

}  // namespace torchconv::cuda
