// The GPU's pooling kernels, as csrc/ops calls them: what csrc/cpu/pool2d.h says of the CPU's holds
// here. Pointers are device memory, dense in the problem's layout.
#pragma once

#include "core/pool_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

void select_pool2d(const PoolProblem& p, Select select, const void* x, void* y, void* offsets,
                   int64_t* indices, const Queue& queue);
void select_pool2d_backward(const PoolProblem& p, Selected kind, const void* dy,
                            const void* selected, void* dx, const Queue& queue);
void select_pool2d_gather(const PoolProblem& p, Selected kind, const void* x, const void* selected,
                          void* y, const Queue& queue);

void avg_pool2d(const PoolProblem& p, const void* x, void* y, const Queue& queue);
void avg_pool2d_backward(const PoolProblem& p, const void* dy, void* dx, const Queue& queue);

}  // namespace torchconv::cuda
