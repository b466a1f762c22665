// Average pooling, ordinary and adaptive, forward and backward: which kernel runs.
#include "cuda/adaptive_pool2d.h"
#include "cuda/pool2d.h"
#include "cuda/pool_backward_bands.h"
#include "cuda/pool_pairs.h"
#include "cuda/pool_patches.h"
#include "cuda/pool_planes.h"
#include "cuda/pool_windows.h"

namespace torchconv::cuda {
namespace {

template <typename T>
void forward(const PoolShape& s, const void* x, void* y, const Queue& queue) {
  const SelectedOutput nothing{Selected::kOffset8, nullptr};
  run_pool_windows(s, Averaging<T>{}, x, y, nothing, queue,
                   [&](int64_t images, const T* from, T* to, const SelectedOutput&) {
                     if constexpr (sizeof(T) < 8)
                       if (run_average_channels(s, images, from, to, queue)) return true;
                     return run_pool_bands<Averaging<T>, false>(s, images, from, to, nothing,
                                                                queue);
                   });
}

// Runs the first of these kernels that takes the problem, where a part of the images can be counted
// in int32_t:
//
//   spread_pairs         NCHW  disjoint 2x2 that cover the plane, rows no whole vectors; no float64
//   spread_planes        NCHW  one window over the whole plane
//   spread_tiles         NCHW  windows without gaps in small planes, which bands do not read and
//                              write in vectors
//   spread_channels      NHWC  one window over the whole image
//   pool_backward_bands  both  2x2 and 3x3 two apart; no float64
//   pool_backward        both  all others
//
// Windows one apart, but for the whole plane's, are averages of dy: see below.
template <typename T>
void backward(const PoolShape& s, const T* dy, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t in = s.h.size * s.w.size * s.channels, out = s.h.out * s.w.out * s.channels;
  if (s.images * in == 0) return;
  const bool vectors = s.channels % n == 0 && aligned<T>(dy, n) && aligned<T>(dx, n);
  each_part(s, [&](auto counter, int64_t first, int64_t images) {
    using I = decltype(counter);
    const T* from = dy + first * out;
    T* to = dx + first * in;
    if constexpr (sizeof(I) == 4) {
      if constexpr (sizeof(T) < 8)
        if (run_spread_pairs(s, images, from, to, queue)) return;
      if (run_spread_planes<T, false>(s, images, from, {Selected::kOffset8, nullptr}, to, queue) ||
          run_spread_tiles(s, images, from, to, queue) ||
          (vectors && run_spread_channels(s, images, from, to, queue)))
        return;
      if constexpr (sizeof(T) < 8) {
        const BandWindow window = band_window<T>(s, vectors);
        if (window == BandWindow::k2x2Stride2)
          return run_backward_bands<T, false, 2, 2, 2>(s, images, from, nullptr, to, queue);
        if (window == BandWindow::k3x3Stride2)
          return run_backward_bands<T, false, 3, 3, 2>(s, images, from, nullptr, to, queue);
      }
      if (vectors) return launch_pool_backward<n, I>(s, images, AddAverage<T>{from}, to, queue);
    }
    launch_pool_backward<1, I>(s, images, AddAverage<T>{from}, to, queue);
  });
}

// Where windows are one element apart and all have one divisor, dx is an average of dy itself.
bool is_average_of_gradients(const PoolShape& s) {
  return !s.adaptive && s.h.stride == 1 && s.w.stride == 1 && (s.divisor != 0 || s.include_pad);
}
PoolShape average_of_gradients(const PoolShape& s) {
  const auto turned = [](const PoolAxis& a) -> PoolAxis {
    return {a.out, a.size, a.taps, 1, a.taps - 1 - a.pad, 1};
  };
  PoolShape gradients = s;
  gradients.h = turned(s.h), gradients.w = turned(s.w);
  gradients.divisor = s.divisor != 0 ? s.divisor : s.h.taps * s.w.taps;
  return gradients;
}

void forward(const PoolShape& s, DType dtype, const void* x, void* y, const Queue& queue) {
  with_float(dtype, [&](auto element) { forward<decltype(element)>(s, x, y, queue); });
}

void backward(const PoolShape& s, DType dtype, const void* dy, void* dx, const Queue& queue) {
  if (is_average_of_gradients(s) && !covers_plane(s))
    return forward(average_of_gradients(s), dtype, dy, dx, queue);
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
