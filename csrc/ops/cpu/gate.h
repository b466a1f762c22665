// Gates on every channel of an image, for chains (chain.cpp).
#pragma once

#include <optional>

#include "ops/chain.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {

// x * gate, with the bits and strides of PyTorch's; none where the kernel is not for these tensors.
// in_place: x's memory may be the result's. repeat: see chain.h; the gate is the step's tensor
// `gate_index`, 0 or 1, and x the other one.
// The same of hardsigmoid, which is for few elements.
std::optional<Tensor> hardsigmoid(const Tensor& x, Repeat* repeat);
std::optional<Tensor> gate_channels(const Tensor& x, const Tensor& gate, bool in_place,
                                    size_t gate_index, Repeat* repeat);

}  // namespace torchconv::ops
