// Depthwise convolution of several filters for each channel in channels_last, by way of an image
// that has each channel as often as it has filters: a plain depthwise problem, whose vectors are
// full.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// The plain depthwise problem of one with a multiplier.
ConvProblem repeated_problem(const ConvProblem& p);

// dst[pixel][c*times + i] = src[pixel][c] for i < times, of at least a vector of T in all.
// Instantiated for float, double, BFloat16 and Float16.
template <typename T>
void repeat_channels(const T* src, int64_t pixels, int64_t channels, int64_t times, T* dst,
                     const Parallel& pool);

}  // namespace torchconv::cpu
