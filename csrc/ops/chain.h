// The steps of a chain (chain.cpp): an operator's result for these tensors and the settings that
// come next in the program.
#pragma once

#include <optional>

#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {

// A result that is read only as a part of a concatenation: where it may be written at once.
struct ConcatenatedPart {
  int64_t first, channels;  // of all
  // All parts' tensor, made for the first one that is written there. A part that is so is a view of
  // it.
  std::optional<Tensor>* whole;
};

// Before conv2d's settings comes whether the residual's layout has to be the output's, and after
// them the owner and the version of packed weights.
Tensor conv2d_step(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, SettingsReader* reader,
                   const ConcatenatedPart* part = nullptr);
Tensor max_pool2d_step(const Tensor& input, SettingsReader* reader);
Tensor avg_pool2d_step(const Tensor& input, SettingsReader* reader);
Tensor adaptive_avg_pool2d_step(const Tensor& input, SettingsReader* reader);

}  // namespace torchconv::ops
