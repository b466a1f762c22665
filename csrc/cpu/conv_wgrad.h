// dw[k, c, t] = sum over n, i, j of dz[n, k, i, j] * x[n, c, i*step_h + t.h, j*step_w + t.w].
#pragma once

#include "core/parallel.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// view is fprop's and not empty. Writes only the taps in the view: others are zero and the
// caller's. Instantiated for float, double, BFloat16 and Float16.
template <typename T>
void conv_wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool);

}  // namespace torchconv::cpu
