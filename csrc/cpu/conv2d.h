// The CPU's convolution kernels, as csrc/ops calls them. Pointers are dense in the problem's
// layouts.
#pragma once

#include <memory>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/packed_weights.h"

namespace torchconv::cpu {

// y = g(z + residual). bias, residual and preactivation may be null; residual, not of integers,
// lies as y does; with preactivation, z + residual is stored there too. What the algorithm packs of
// the weights is kept for their owner, if there is one.
void conv2d_fprop(const ConvProblem& problem, const void* x, const void* w,
                  const WeightsOwner& owner, const void* bias, const void* residual, void* y,
                  void* preactivation, const Parallel& pool);

// conv2d_fprop of one problem, for calls that repeat it: what follows from the problem and the
// switches of conv_choice.h alone has been found. Thread-safe.
class ConvPlan {
 public:
  virtual ~ConvPlan() = default;
  virtual void run(const void* x, const void* w, const WeightsOwner& owner, const void* bias,
                   const void* residual, void* y, void* preactivation,
                   const Parallel& pool) const = 0;
};
// owner: whether the calls will have one, and of frozen weights. Null for integers.
std::shared_ptr<const ConvPlan> plan_conv2d_fprop(const ConvProblem& problem,
                                                  const WeightsOwner& owner);

// Whether conv2d_fprop's way of this problem can write y as a part of the channels of a larger
// image (pixel_channels), at no cost and to the same bits.
bool conv2d_writes_parts(const ConvProblem& problem);

// Gradients of L with respect to x, w and b from dy = dL/dy; any of dx, dw, db may be null.
// saved is y, or the pre-activation where derivative_needs_preactivation, or null for kNone.
void conv2d_backward(const ConvProblem& problem, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Parallel& pool);

}  // namespace torchconv::cpu
