// Max and min pooling's backward: dx receives dy at the selected elements. The kernels are in
// select_pool2d_rows.h and select_pool2d_scatter.h; here the run-time types and the sizes choose
// one.
#include "cpu/pool2d.h"
#include "cpu/select_pool2d_rows.h"
#include "cpu/select_pool2d_scatter.h"

namespace torchconv::cpu {
namespace {

template <typename T, typename O>
void scatter(const PoolProblem& p, const T* dy, const void* selected, T* dx, const Parallel& pool) {
  ScatterImages<T, O>(p, dy, static_cast<const O*>(selected), dx).run(pool);
}

// Gathering compares a vector of codes for every window that an element belongs to; scattering
// takes some steps for every output, on one thread for each image. On planes it is better from
// stride 2 on, as an element then belongs to few windows, and else only for large windows: always
// for those whose offsets take more than a byte.
template <typename T>
bool runs_by_scatter(const PoolProblem& p, Selected kind) {
  if (kind == Selected::kOffset16 || kind == Selected::kOffset32) return true;
  constexpr int64_t kCache = 256 * 1024;
  constexpr int64_t kLanes = WideVec<T>::kLanes;
  const bool wide_index = kind == Selected::kIndex64 && sizeof(LaneInt<T>) == 4 &&
                          p.H * p.W > INT32_MAX;  // does not fit a lane
  if (wide_index) return true;
  const int64_t images = ScatterImages<T, uint8_t>::images(p);
  const int64_t plane_bytes = p.H * p.W * static_cast<int64_t>(sizeof(Wide<T>));
  if (images < 16 && plane_bytes > kCache / 16) return false;
  const int64_t windows = ceil_div(p.R, p.stride_h) * ceil_div(p.S, p.stride_w);
  if (runs_channels_last(p)) return windows > 6 * kLanes;
  return windows > std::max<int64_t>(9, 2 * kLanes) || (p.stride_w > 1 && plane_bytes <= kCache);
}

template <typename T>
void backward_as(const PoolProblem& p, Selected kind, const void* grad, const void* selected,
                 void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (runs_by_scatter<T>(p, kind)) {
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
  if (kind == Selected::kOffset8) {
    SelectionRows<T, false>(p, dy, selected, dx).run(pool);
  } else {
    SelectionRows<T, true>(p, dy, selected, dx).run(pool);
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
