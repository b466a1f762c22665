// Adaptive pooling on the CPU, as csrc/ops calls it. Pointers are dense in the problem's layout.
//
// Output i of an axis of P outputs over H elements has the window [floor(i*H/P), ceil((i+1)*H/P)),
// PyTorch's rule: neighbouring windows share at most one element where P <= H, and an element is
// repeated where P > H. Where P and Q divide H and W the windows are those of ordinary pooling with
// kernel = stride = (H/P, W/Q), and its kernels run.
#pragma once

#include "core/parallel.h"
#include "core/types.h"

namespace torchconv {

struct AdaptiveProblem {
  int64_t N, C, H, W;  // x; H > 0 and W > 0
  int64_t P, Q;        // y: N x C x P x Q
  DType dtype;         // float32, float64, bfloat16 or float16
  Layout layout;       // of x, y, indices and gradients
};

namespace cpu {

// Whether the windows are those of ordinary pooling.
constexpr bool divides_evenly(const AdaptiveProblem& p) {
  return p.P > 0 && p.Q > 0 && p.H % p.P == 0 && p.W % p.Q == 0;
}

void adaptive_avg_pool2d(const AdaptiveProblem& p, const void* x, void* y, const Parallel& pool);
// Every element of dx is written, here and below.
void adaptive_avg_pool2d_backward(const AdaptiveProblem& p, const void* dy, void* dx,
                                  const Parallel& pool);

// y and, where not null, the index h*W + w of each maximum: the first of equal ones, but the last
// of several NaN. Where the sizes do not divide, a window may span at most INT32_MAX elements.
void adaptive_max_pool2d(const AdaptiveProblem& p, const void* x, void* y, int64_t* indices,
                         const Parallel& pool);
// dx[h,w] = sum of dy over the windows that selected (h,w). An index that names no element of its
// window may be ignored, and never leads outside dx.
void adaptive_max_pool2d_backward(const AdaptiveProblem& p, const void* dy, const int64_t* indices,
                                  void* dx, const Parallel& pool);
// The adjoint: y[p,q] = x at the index, 0 where that is no element.
void adaptive_max_pool2d_gather(const AdaptiveProblem& p, const void* x, const int64_t* indices,
                                void* y, const Parallel& pool);

}  // namespace cpu
}  // namespace torchconv
