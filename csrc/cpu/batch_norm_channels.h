// What batch normalisation computes once a channel, in double, whatever the elements' type.
#pragma once

#include "cpu/batch_norm.h"

namespace torchconv::cpu {

// Sums of d = x - shift and of d * d over one channel of a batch.
struct Moments {
  double shift, sum, squares;
};

struct Statistics {
  double mean, invstd;
};

// y = (x - shift) * scale + offset. shift is a number of the type that this is computed in: the
// mean of that type would, where it is large beside the deviation, be the larger error by far.
struct Affine {
  double shift, scale, offset;
};

// Of a batch, and what running statistics make of it.
Statistics batch_statistics(const BatchNormProblem& p, int64_t channel, Moments moments,
                            RunningStatistics running, double eps);
Statistics given_statistics(const BatchNormProblem& p, int64_t channel, const void* mean,
                            const void* var, double eps);

Affine affine_of(const BatchNormProblem& p, int64_t channel, Statistics statistics,
                 BatchNormWeights weights);

// dx = g * scale + (x - shift) * slope + constant.
struct InputGradient {
  double slope, constant;
};
// From the sums of g, the gradient before the activation, and of g * (x - shift). Also writes the
// gradients of weight and bias.
InputGradient channel_gradients(const BatchNormProblem& p, int64_t channel, Statistics statistics,
                                Affine affine, double sum, double products, bool training,
                                BatchNormGradients to);

// The range outside which an activation is constant; NaN where it has no end. Comparisons with a
// NaN do not hold, so that an x of NaN passes and has a gradient, as in PyTorch.
struct Bounds {
  double low, high;
};
Bounds activation_bounds(Activation activation);
// The same for a number that is yet to be rounded to the problem's type: those that will be a
// bound.
Bounds unrounded_bounds(const BatchNormProblem& p);

}  // namespace torchconv::cpu
