// The GPU's convolution kernels, as csrc/ops calls them: what csrc/cpu/conv2d.h says of the CPU's
// holds here. Pointers are device memory, dense in the problem's layouts.
#pragma once

#include <string>

#include "core/conv_problem.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

// y = g(z). bias and preactivation may be null; with preactivation, z is stored there too.
void conv2d_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  void* preactivation, bool allow_tf32, const Queue& queue);

// Gradients of L with respect to x, w and b from dy = dL/dy; any of dx, dw, db may be null.
// saved is y, or the pre-activation where derivative_needs_preactivation, or null for kNone.
void conv2d_backward(const ConvProblem& p, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, bool allow_tf32,
                     const Queue& queue);

}  // namespace torchconv::cuda
