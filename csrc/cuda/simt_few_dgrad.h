// dgrad of few channels over NCHW in exact float32: see simt_few_dgrad.cu.
#pragma once

#include "core/conv_problem.h"
#include "cuda/queue.h"
#include "cuda/simt_view.h"

namespace torchconv::cuda {

bool simt_few_dgrad_takes(const ConvProblem& p);
void simt_few_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                    const Queue& queue);

}  // namespace torchconv::cuda
