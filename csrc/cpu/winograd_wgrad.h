// The weight gradient in Winograd's domain: 3x3 and 5x5 kernels of any dilation, 3x3 kernels with
// stride 2, and the first layer's 7x7 kernel with stride 2. A is float or double.
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// Whether view (fprop's) is one of these. Images may be as small as one tile.
bool winograd_wgrad_applies(const ConvView& view);

// What it does of a sample, for a view that it applies to.
struct WinogradWgradCost {
  const char* scheme;
  int64_t tiles;
  int64_t products;  // multiplications for a channel and a filter
};
WinogradWgradCost winograd_wgrad_cost(const ConvView& view);

// Writes dw. False where an element is not finite: the transforms spread infinity, NaN and overflow
// over all taps, so that the caller has to compute dw another way.
template <typename A>
bool winograd_wgrad(const ConvView& view, const A* dz, const A* x, A* dw, const Parallel& pool);

}  // namespace torchconv::cpu
