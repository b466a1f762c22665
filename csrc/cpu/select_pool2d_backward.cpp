// Max and min pooling's backward: dx receives dy at the selected elements. The kernels are in
// pool2d_backward_nchw.h and pool2d_backward_nhwc.h; here the run-time types choose one.
#include "cpu/pool2d.h"
#include "cpu/pool2d_backward_nchw.h"
#include "cpu/pool2d_backward_nhwc.h"

namespace torchconv::cpu {
namespace {

template <typename T, typename O>
void pixels(const PoolProblem& p, const T* dy, const void* selected, T* dx, const Parallel& pool) {
  PixelsBackward<T, O>(p, dy, static_cast<const O*>(selected), dx).run(pool);
}

template <typename T>
void backward_as(const PoolProblem& p, Selected kind, const void* grad, const void* selected,
                 void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (runs_channels_last(p)) {
    switch (kind) {
      case Selected::kOffset8:
        return pixels<T, uint8_t>(p, dy, selected, dx, pool);
      case Selected::kOffset16:
        return pixels<T, uint16_t>(p, dy, selected, dx, pool);
      case Selected::kOffset32:
        return pixels<T, int32_t>(p, dy, selected, dx, pool);
      case Selected::kIndex64:
        return pixels<T, int64_t>(p, dy, selected, dx, pool);
    }
  }
  // An index that does not fit a lane is compared as an offset in its window.
  const bool fits = sizeof(LaneInt<T>) == 8 || p.H * p.W <= INT32_MAX;
  if (kind == Selected::kIndex64 && fits) {
    PlanesBackward<T, Match::kIndex>(p, dy, kind, selected, dx).run(pool);
  } else {
    PlanesBackward<T, Match::kOffset>(p, dy, kind, selected, dx).run(pool);
  }
}

}  // namespace

void select_pool2d_backward(const PoolProblem& p, Selected kind, const void* dy,
                            const void* selected, void* dx, const Parallel& pool) {
  if (p.N == 0 || p.C == 0 || p.H == 0 || p.W == 0) return;
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float>(p, kind, dy, selected, dx, pool);
    case DType::kFloat64:
      return backward_as<double>(p, kind, dy, selected, dx, pool);
    case DType::kBFloat16:
      return backward_as<BFloat16>(p, kind, dy, selected, dx, pool);
    case DType::kFloat16:
      return backward_as<Float16>(p, kind, dy, selected, dx, pool);
    default:
      return;  // the integer types have no gradient
  }
}

}  // namespace torchconv::cpu
