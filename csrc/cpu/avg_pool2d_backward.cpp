// Average pooling's backward: every element of a window receives dy over the window's divisor. The
// kernels are in pool2d_backward_nchw.h and pool2d_backward_nhwc.h.
#include "cpu/pool2d.h"
#include "cpu/pool2d_backward_nchw.h"
#include "cpu/pool2d_backward_nhwc.h"

namespace torchconv::cpu {
namespace {

template <typename T>
void backward_as(const PoolProblem& p, const void* grad, void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (runs_channels_last(p)) {
    PixelsBackward<T, void>(p, dy, nullptr, dx).run(pool);
  } else {
    PlanesBackward<T, Match::kAll>(p, dy, Selected::kOffset8, nullptr, dx).run(pool);
  }
}

}  // namespace

void avg_pool2d_backward(const PoolProblem& p, const void* dy, void* dx, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float>(p, dy, dx, pool);
    case DType::kFloat64:
      return backward_as<double>(p, dy, dx, pool);
    case DType::kBFloat16:
      return backward_as<BFloat16>(p, dy, dx, pool);
    case DType::kFloat16:
      return backward_as<Float16>(p, dy, dx, pool);
    default:
      return;  // csrc/ops refuses the integer types
  }
}

}  // namespace torchconv::cpu
