// One adaptive 2D pooling, described once by csrc/ops and read by every kernel.
//
// Output i of an axis of P outputs over H elements has the window [floor(i*H/P), ceil((i+1)*H/P)),
// PyTorch's rule: neighbouring windows share at most one element where P <= H, and an element is
// repeated where P > H.
#pragma once

#include "core/types.h"

namespace torchconv {

struct AdaptiveProblem {
  int64_t N, C, H, W;  // x; H > 0 and W > 0
  int64_t P, Q;        // y: N x C x P x Q
  DType dtype;         // float32, float64, bfloat16 or float16
  Layout layout;       // of x, y, indices and gradients
};

// Whether the windows are those of ordinary pooling with kernel = stride = (H/P, W/Q).
constexpr bool divides_evenly(const AdaptiveProblem& p) {
  return p.P > 0 && p.Q > 0 && p.H % p.P == 0 && p.W % p.Q == 0;
}

}  // namespace torchconv
