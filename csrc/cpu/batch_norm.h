// Batch normalisation on the CPU, as csrc/ops calls it: y = act((x - mean) * invstd * weight + bias
// [+ residual]). Pointers are dense in the problem's layout; those that may be null are marked.
//
// Statistics are sums in double, so that they lose nothing where the mean is large beside the
// deviation, and are cut by the problem's shape only.
#pragma once

#include "core/batch_norm_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// By channel, each null where there is none.
struct BatchNormWeights {
  const void *weight, *bias;
};
struct RunningStatistics {
  void *mean, *var;
  double momentum;
};

// By the batch's own mean and variance, which running statistics (if any) follow. mean and
// invstd = (var + eps)^-1/2, of C elements, are for the backward pass.
void batch_norm_training(const BatchNormProblem& p, const void* x, const void* residual /* null */,
                         BatchNormWeights weights, RunningStatistics running, double eps, void* y,
                         double* mean, double* invstd, const Parallel& pool);
// By a given mean and variance.
void batch_norm_inference(const BatchNormProblem& p, const void* x, const void* residual /* null */,
                          BatchNormWeights weights, const void* mean, const void* var, double eps,
                          void* y, const Parallel& pool);

struct BatchNormGradients {
  void *dx, *dresidual, *dweight, *dbias;  // null where not wanted
};
// training: whether mean and invstd are the batch's, so that they too depend on x.
// y: of the forward pass if that had a residual, else null: it is computed again.
void batch_norm_backward(const BatchNormProblem& p, const void* dy, const void* x,
                         const void* y /* null */, BatchNormWeights weights, const double* mean,
                         const double* invstd, bool training, BatchNormGradients to,
                         const Parallel& pool);

}  // namespace torchconv::cpu
