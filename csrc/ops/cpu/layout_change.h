// Images in another layout than a kernel reads them in.
#pragma once

#include <optional>

#include "cpu/channels_last_copy.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {

// How to make t dense in `layout`, where it is in the other one and there is a kernel.
inline std::optional<cpu::LayoutChange> layout_change(const Tensor& t, Layout layout) {
  if (!is_dense(t, layout == Layout::kNHWC ? Layout::kNCHW : Layout::kNHWC)) return std::nullopt;
  const IntList s = t.sizes();
  const cpu::LayoutChange change{static_cast<int64_t>(t.element_size()), s[0], s[1], s[2] * s[3],
                                 layout};
  return change.exists() ? std::optional(change) : std::nullopt;
}

}  // namespace torchconv::ops
