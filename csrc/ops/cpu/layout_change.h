// Images in another layout than a kernel reads them in.
#pragma once

#include <optional>

#include "cpu/channels_last_copy.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {

// How to make t dense in `layout`, where it is in the other one and of a type for which there is
// a kernel.
inline std::optional<cpu::LayoutChange> layout_change(const Tensor& t, Layout layout) {
  const bool from_nchw = layout == Layout::kNHWC;
  const ScalarType type = t.scalar_type();
  if (type != ScalarType::Float && type != ScalarType::Double) return std::nullopt;
  if (!is_dense(t, from_nchw ? Layout::kNCHW : Layout::kNHWC)) return std::nullopt;
  const IntList s = t.sizes();
  const DType dtype = type == ScalarType::Float ? DType::kFloat32 : DType::kFloat64;
  return cpu::LayoutChange{dtype, s[0], s[1], s[2] * s[3], layout};
}

}  // namespace torchconv::ops
