// What the tensor cores take over NCHW as it lies beside what conv_passes.h has.
#pragma once

#include "cuda/conv_passes.h"

namespace torchconv::cuda {

// dx and dw of a 1x1 kernel in one go. dx may be null: that is how mma_wgrad computes dw of such
// problems, so that dw has the same bits either way; dx has those of mma_dgrad, which adds in the
// same order.
bool planes_gradients_take(const ConvProblem& p, const Queue& queue);
void planes_gradients(const ConvProblem& p, const void* dz, const void* x, const void* w, void* dx,
                      void* dw, const Queue& queue);

}  // namespace torchconv::cuda
