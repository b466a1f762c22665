// The CPU's pooling kernels, as csrc/ops calls them. Pointers are dense in the problem's layout.
#pragma once

#include "core/parallel.h"
#include "core/pool_problem.h"

namespace torchconv::cpu {

// y and, where not null, what was selected: offsets of type offset_dtype(R, S), or int64 indices
// h*W + w. At most one of the two is wanted. The first of equal elements is selected, but the last
// of several NaN (as PyTorch does), and any NaN makes the result NaN. A window with no valid
// element gives -inf (max), +inf (min) or the integer type's lowest / highest, and kNoOffset.
void select_pool2d(const PoolProblem& p, Select select, const void* x, void* y, void* offsets,
                   int64_t* indices, const Parallel& pool);

// dx[h,w] = sum of dy over the windows that selected (h,w). Every element of dx is written.
void select_pool2d_backward(const PoolProblem& p, Selected kind, const void* dy,
                            const void* selected, void* dx, const Parallel& pool);

// The adjoint: y[p,q] = x at the element that window (p,q) selected, 0 where there is none.
void select_pool2d_gather(const PoolProblem& p, Selected kind, const void* x, const void* selected,
                          void* y, const Parallel& pool);

void avg_pool2d(const PoolProblem& p, const void* x, void* y, const Parallel& pool);
void avg_pool2d_backward(const PoolProblem& p, const void* dy, void* dx, const Parallel& pool);

}  // namespace torchconv::cpu
