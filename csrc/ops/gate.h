// Images times a gate on every channel, for chains (chain.cpp).
#pragma once

#include <optional>

#include "ops/tensor_args.h"

namespace torchconv::ops {

// x * gate, with the bits and strides of PyTorch's; none where the kernel is not for these tensors.
// in_place: x's memory may be the result's.
#ifdef TORCHCONV_CUDA
inline std::optional<Tensor> gate_channels(const Tensor&, const Tensor&, bool) {
  return std::nullopt;
}
#else
std::optional<Tensor> gate_channels(const Tensor& x, const Tensor& gate, bool in_place);
#endif

}  // namespace torchconv::ops
