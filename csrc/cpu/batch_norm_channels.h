// What batch normalisation computes once a channel, in double, whatever the elements' type: for a
// few channels at a time, because one channel alone is a long chain of roots and quotients.
#pragma once

#include "cpu/batch_norm.h"

namespace torchconv::cpu {

inline constexpr int kChannelTile = 16;

// At most kChannelTile channels; the rest of what is computed of them has no meaning.
struct Channels {
  int64_t first, count;
};
struct alignas(64) PerChannel {
  double of[kChannelTile];

  double& operator[](int64_t i) { return of[i]; }
  double operator[](int64_t i) const { return of[i]; }
};

// Sums of d = x - shift and of d * d over each channel of a batch.
struct Moments {
  PerChannel shift, sum, squares;
};

struct Statistics {
  PerChannel mean, invstd;
};

// y = (x - shift) * scale + offset. shift is a number of the type that this is computed in: the
// mean of that type would, where it is large beside the deviation, be the larger error by far.
struct Affine {
  PerChannel shift, scale, offset;
};

// Of a batch, and what running statistics make of it.
Statistics batch_statistics(const BatchNormProblem& p, Channels c, const Moments& moments,
                            RunningStatistics running, double eps);
Statistics given_statistics(const BatchNormProblem& p, Channels c, const void* mean,
                            const void* var, double eps);

// Whether sums in float32 are as good as those in double: shift is within a few deviations of the
// mean, and no square is too large or too small.
bool near_enough(const BatchNormProblem& p, Channels c, const Moments& moments);

Affine affine_of(const BatchNormProblem& p, Channels c, const Statistics& statistics,
                 BatchNormWeights weights);

// dx = g * scale + (x - shift) * slope + constant.
struct InputGradient {
  PerChannel slope, constant;
};
// From the sums of g, the gradient before the activation, and of g * (x - shift). Also writes the
// gradients of weight and bias.
InputGradient channel_gradients(const BatchNormProblem& p, Channels c, const Statistics& s,
                                const Affine& affine, const double* sums, const double* products,
                                bool training, BatchNormGradients to);

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
