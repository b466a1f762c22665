// What the tensor cores take over NCHW as it lies beside what conv_passes.h has.
#pragma once

#include "cuda/conv_passes.h"

namespace torchconv::cuda {

// dx and dw of a 1x1 kernel in one go, the same bits as mma_dgrad and mma_wgrad of such problems
// that both take; either may be null.
bool planes_gradients_take(const ConvProblem& p, const Queue& queue);
void planes_gradients(const ConvProblem& p, const void* dz, const void* x, const void* w, void* dx,
                      void* dw, const Queue& queue);

}  // namespace torchconv::cuda
