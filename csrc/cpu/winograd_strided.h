// Convolution of stride 2 by Winograd, fprop and dgrad: 81 multiplications for what takes the
// direct algorithm 144 with a 3x3 kernel, and 144 for 441 with a 7x7 kernel of few channels.
#pragma once

#include <cstdint>
#include <vector>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/activation.h"

namespace torchconv::cpu {

enum class StridedPass { kFprop, kDgrad };

// Whether the problem is one that these compute: float32, stride 2 both ways, no dilation, one
// group, outputs, and a kernel of 3x3, or one of six or seven rows and columns with few channels.
bool strided_winograd_applies(const ConvProblem& p);

// Multiplications for a sample, a channel and a filter.
int64_t strided_winograd_products(const ConvProblem& p, StridedPass pass);

// Elements of fprop's transformed weights where they are worth keeping from call to call; 0 where
// transforming anew costs less than reading them. They depend on the weights, their sizes and
// layout, and flip alone.
int64_t strided_winograd_weights_size(const ConvProblem& p);
void strided_winograd_pack_weights(const ConvProblem& p, const float* w, float* u,
                                   const Parallel& pool);

// dst from src: z from x, or dx from dz, all of it. u: fprop's transformed weights, or null.
// As winograd_gather does, returns the samples that hold an infinity, a NaN or an overflow, in
// ascending order: the caller has to compute them in another way.
std::vector<int64_t> strided_winograd(const ConvProblem& p, StridedPass pass, const float* src,
                                      const float* w, const float* bias,
                                      const Epilogue<float>& epilogue, const Parallel& pool,
                                      const float* u = nullptr);

}  // namespace torchconv::cpu
