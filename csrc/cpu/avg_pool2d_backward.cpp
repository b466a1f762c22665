// Average pooling's backward: every element of a window receives dy over the window's divisor. The
// kernel is in avg_pool2d_rows.h; planes with one output are written here.
#include "cpu/avg_pool2d_rows.h"
#include "cpu/pool2d.h"

namespace torchconv::cpu {
namespace {

// Planes (NCHW) with one output, whose window covers them: each is one value.
template <typename T>
void spread(const PoolProblem& p, const T* dy, T* dx, const Parallel& pool) {
  using W = WideVec<T>;
  constexpr int kLanes = W::kLanes;
  const int64_t elements = p.H * p.W;
  const Wide<T> divisor = static_cast<Wide<T>>(vertical_factor(p, vertical_axis(p), 0) *
                                               horizontal_factor(p, horizontal_axis(p), 0));
  const int64_t grain = pool_grain(elements * static_cast<int64_t>(sizeof(T)));
  parallel_for(pool, 0, p.N * p.C, grain, [&](int64_t begin, int64_t end) {
    const T* last = dx + end * elements;
    for (int64_t plane = begin; plane < end; plane++) {
      const auto value = W::broadcast(to_wide<T>(dy[plane]) / divisor);
      // A plane's last vector spills into the next one, which is written after it.
      T* to = dx + plane * elements;
      for (int64_t i = 0; i < elements; i += kLanes) {
        if (last - (to + i) >= kLanes) {
          W::store(to + i, value);
        } else {
          W::store_partial(to + i, value, elements - i);
        }
      }
    }
  });
}

bool covers(const Axis& axis) {
  const Range taps = axis.valid_taps(0);
  return axis.out == 1 && taps.size() == axis.size;
}

template <typename T>
void backward_as(const PoolProblem& p, const void* grad, void* grad_input, const Parallel& pool) {
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  if (!runs_channels_last(p) && covers(vertical_axis(p)) && covers(horizontal_axis(p))) {
    spread(p, dy, dx, pool);
  } else {
    AverageRows<T>(p, dy, dx).run(pool);
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
