// The GPU's convolution kernels, as csrc/ops calls them: what csrc/cpu/conv2d.h says of the CPU's
// holds here. Pointers are device memory, dense in the problem's layouts.
#pragma once

#include <string>

#include "core/conv_problem.h"
#include "core/weights_owner.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

// y = g(z + residual). bias, residual and preactivation may be null; residual, not of integers,
// lies as y does; with preactivation, z + residual is stored there too. Nothing is kept for an
// owner: the weights are read as they are, or copied at no cost to speak of.
void conv2d_fprop(const ConvProblem& p, const void* x, const void* w, const WeightsOwner& owner,
                  const void* bias, const void* residual, void* y, void* preactivation,
                  const Queue& queue);

// Gradients of L with respect to x, w and b from dy = dL/dy; any of dx, dw, db may be null.
// saved is y, or the pre-activation where derivative_needs_preactivation, or null for kNone.
void conv2d_backward(const ConvProblem& p, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Queue& queue);

// What csrc/cpu/conv_explain.h says of the CPU's.
std::string conv2d_explain(const ConvProblem& p, const Queue& queue);

}  // namespace torchconv::cuda
