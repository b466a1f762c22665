// Adaptive max pooling's backward, and its adjoint, where the sizes do not divide evenly: the
// outputs of an image are scattered into it (select_pool2d_scatter.h), as an index needs no window
// to be found. Indices are not trusted: one outside the image adds nothing.
#include "cpu/adaptive_window.h"
#include "cpu/pool2d.h"
#include "cpu/select_pool2d_scatter.h"

namespace torchconv::cpu {
namespace {

// For kernels that find an element by its index, and need no window.
PoolProblem without_windows(const AdaptiveProblem& p) {
  PoolProblem pool{};
  pool.N = p.N, pool.C = p.C, pool.H = p.H, pool.W = p.W;
  pool.P = p.P, pool.Q = p.Q;
  pool.R = pool.S = pool.stride_h = pool.stride_w = 1;
  pool.dilation_h = pool.dilation_w = 1;
  pool.dtype = p.dtype;
  pool.layout = p.layout;
  return pool;
}

template <typename T>
void backward_as(const AdaptiveProblem& p, const void* grad, const int64_t* indices,
                 void* grad_input, const Parallel& pool) {
  const PoolProblem problem = without_windows(p);
  const ScatterImages<T, const int64_t*> scatter(problem, static_cast<const T*>(grad), indices,
                                                 static_cast<T*>(grad_input), true);
  scatter.run(pool);
}

}  // namespace

void adaptive_max_pool2d_backward(const AdaptiveProblem& p, const void* dy, const int64_t* indices,
                                  void* dx, const Parallel& pool) {
  if (is_empty(p)) return fill_zero(p, dx);
  if (divides_evenly(p)) {
    return select_pool2d_backward(ordinary_pooling(p), Selected::kIndex64, dy, indices, dx, pool);
  }
  switch (p.dtype) {
    case DType::kFloat32:
      return backward_as<float>(p, dy, indices, dx, pool);
    case DType::kFloat64:
      return backward_as<double>(p, dy, indices, dx, pool);
    case DType::kBFloat16:
      return backward_as<BFloat16>(p, dy, indices, dx, pool);
    case DType::kFloat16:
      return backward_as<Float16>(p, dy, indices, dx, pool);
    default:
      return;  // csrc/ops refuses the integer types
  }
}

void adaptive_max_pool2d_gather(const AdaptiveProblem& p, const void* x, const int64_t* indices,
                                void* y, const Parallel& pool) {
  if (is_empty(p)) return;
  select_pool2d_gather(without_windows(p), Selected::kIndex64, x, indices, y, pool);
}

}  // namespace torchconv::cpu
