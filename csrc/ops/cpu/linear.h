// A linear layer as a step of a chain (chain.cpp): over few rows it is the 1x1 convolution of
// images of one pixel, as torchconv.functional.linear has it, and else PyTorch's.
#pragma once

#include <optional>

#include "ops/chain.h"

namespace torchconv::ops {

// input: N x C x 1 x 1. weight: K x C. settings: up to how many rows it is a convolution, then
// conv2d_step's. The result is N x K x 1 x 1.
Tensor linear_step(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   SettingsReader* settings, Repeat* repeat);

}  // namespace torchconv::ops
