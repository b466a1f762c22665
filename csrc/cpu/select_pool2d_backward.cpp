// Max and min pooling's backward: dx receives dy at the selected elements. The kernels are in
// select_pool2d_scatter.h, pool2d_backward_nchw.h and pool2d_backward_nhwc.h; here the run-time
// types and the sizes choose one.
#include "cpu/pool2d.h"
#include "cpu/pool2d_backward_nchw.h"
#include "cpu/pool2d_backward_nhwc.h"
#include "cpu/select_pool2d_scatter.h"

namespace torchconv::cpu {
namespace {

template <typename T, typename O>
void pixels(const PoolProblem& p, const T* dy, const void* selected, T* dx, const Parallel& pool) {
  PixelsBackward<T, O>(p, dy, static_cast<const O*>(selected), dx).run(pool);
}

template <typename T, typename O>
void scatter(const PoolProblem& p, const T* dy, const void* selected, T* dx, const Parallel& pool) {
  ScatterImages<T, O>(p, dy, static_cast<const O*>(selected), dx).run(pool);
}

// Whether an image of sums stays in cache and there are images enough to share out. In NHWC the
// vectors over channels are better where they are full and a pixel belongs to few windows.
template <typename T>
bool runs_by_scatter(const PoolProblem& p) {
  constexpr int64_t kCache = 256 * 1024;
  const int64_t channels = runs_channels_last(p) ? p.C : 1;
  const int64_t windows = ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w);
  if (channels >= WideVec<T>::kLanes / 2 && windows <= 16) return false;
  const int64_t bytes = p.H * p.W * channels * static_cast<int64_t>(sizeof(Wide<T>));
  return bytes <= kCache && (p.N * p.C / channels >= 16 || bytes <= kCache / 16);
}

template <typename T>
void backward_as(const PoolProblem& p, Selected kind, const void* grad, const void* selected,
                 void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (runs_by_scatter<T>(p)) {
    switch (kind) {
      case Selected::kOffset8:
        return scatter<T, uint8_t>(p, dy, selected, dx, pool);
      case Selected::kOffset16:
        return scatter<T, uint16_t>(p, dy, selected, dx, pool);
      case Selected::kOffset32:
        return scatter<T, int32_t>(p, dy, selected, dx, pool);
      case Selected::kIndex64:
        return scatter<T, int64_t>(p, dy, selected, dx, pool);
    }
  }
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
