// PyTorch's own operators, by name.
#pragma once

#include <array>

#include "ops/tensor_args.h"

namespace torchconv::ops {

// What the operator makes of these arguments.
template <typename... Arguments>
Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
  using torch::stable::detail::from;
  std::array<StableIValue, sizeof...(Arguments)> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace torchconv::ops
