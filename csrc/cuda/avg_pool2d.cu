// Average pooling, ordinary and adaptive, forward and backward: which kernel runs.
#include "cuda/adaptive_pool2d.h"
#include "cuda/pool2d.h"
#include "cuda/pool_backward.h"
#include "cuda/pool_windows.h"

namespace torchconv::cuda {
namespace {

void forward(const PoolShape& s, DType dtype, const void* x, void* y, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    run_pool_windows(s, Averaging<T>{}, x, y, {Selected::kOffset8, nullptr}, queue);
  });
}

template <typename T>
void backward(const PoolShape& s, const T* dy, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t in = s.h.size * s.w.size * s.channels, out = s.h.out * s.w.out * s.channels;
  if (s.images * in == 0) return;
  const bool vectors = s.channels % n == 0 && aligned<T>(dy, n) && aligned<T>(dx, n);
  each_part(s, [&](auto counter, int64_t first, int64_t images) {
    using I = decltype(counter);
    const AddAverage<T> rule{dy + first * out};
    T* to = dx + first * in;
    if constexpr (sizeof(I) == 4)
      if (vectors) return launch_pool_backward<n, I>(s, images, rule, to, queue);
    launch_pool_backward<1, I>(s, images, rule, to, queue);
  });
}

void backward(const PoolShape& s, DType dtype, const void* dy, void* dx, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    backward(s, static_cast<const T*>(dy), static_cast<T*>(dx), queue);
  });
}

}  // namespace

void avg_pool2d(const PoolProblem& p, const void* x, void* y, const Queue& queue) {
  forward(pool_shape(p), p.dtype, x, y, queue);
}

void avg_pool2d_backward(const PoolProblem& p, const void* dy, void* dx, const Queue& queue) {
  backward(pool_shape(p), p.dtype, dy, dx, queue);
}

void adaptive_avg_pool2d(const AdaptiveProblem& p, const void* x, void* y, const Queue& queue) {
  forward(pool_shape(p), p.dtype, x, y, queue);
}

void adaptive_avg_pool2d_backward(const AdaptiveProblem& p, const void* dy, void* dx,
                                  const Queue& queue) {
  backward(pool_shape(p), p.dtype, dy, dx, queue);
}

}  // namespace torchconv::cuda
