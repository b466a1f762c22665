// Max and min pooling's backward: which kernel runs.
#include "cuda/adaptive_pool2d.h"
#include "cuda/pool2d.h"
#include "cuda/pool_backward_bands.h"
#include "cuda/pool_planes.h"
#include "cuda/pool_quads.h"
#include "cuda/pool_scatter.h"
#include "cuda/pool_tiles.h"

namespace torchconv::cuda {
namespace {

// Runs the first of these kernels that takes the problem, where a part of the images can be counted
// in int32_t:
//
//   spread_planes         NCHW  one window over the whole plane
//   scatter_windows       both  16 elements of dx or more for each window, where few windows have
//                               an element in common; NHWC: 128 bytes of channels
//   scatter_tiles         NCHW  windows without gaps in small planes, but for what bands and quads
//                               read and write in vectors
//   select_plane_quads    NCHW  byte offsets of 2x2 and 3x3 two apart, rows whole vectors
//   select_channel_quads  NHWC  byte offsets of 2x2 and 3x3 two apart
//   pool_backward_bands   both  byte offsets of 3x3 one apart; NCHW: two apart too
//   pool_backward         both  all others
//
// Neither quads nor bands have float64.
template <typename T>
void run(const PoolShape& s, Selected kind, const T* dy, const void* selected, T* dx,
         const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t in = s.h.size * s.w.size * s.channels, out = s.h.out * s.w.out * s.channels;
  if (s.images * in == 0) return;
  const bool vectors = s.channels % n == 0 && aligned<T>(dy, n) && aligned<T>(dx, n) &&
                       aligned_codes(kind, selected, n);
  each_part(s, [&](auto counter, int64_t first, int64_t images) {
    using I = decltype(counter);
    const SelectedArray codes = part_of({kind, selected}, first * out);
    const T* from = dy + first * out;
    T* to = dx + first * in;
    if constexpr (sizeof(I) == 4) {
      if (run_spread_planes<T, true>(s, images, from, codes, to, queue) ||
          run_scatter_windows(s, images, from, codes, to, queue) ||
          run_scatter_tiles(s, images, from, codes, to, queue))
        return;
      if constexpr (sizeof(T) < 8) {
        const auto* offsets = static_cast<const uint8_t*>(codes.data);
        switch (kind == Selected::kOffset8 ? band_window<T>(s, vectors) : BandWindow::kNone) {
          case BandWindow::k2x2Stride2:
            return run_select_quads<T, 2>(s, images, from, offsets, to, queue);
          case BandWindow::k3x3Stride2:
            return run_select_quads<T, 3>(s, images, from, offsets, to, queue);
          case BandWindow::k3x3Stride1:
            return run_backward_bands<T, true, 3, 3, 1>(s, images, from, offsets, to, queue);
          case BandWindow::kNone:
            break;
        }
      }
      if (kind == Selected::kOffset8) {
        const AddSelected<T, uint8_t> rule{from, static_cast<const uint8_t*>(codes.data)};
        if (vectors) return launch_pool_backward<n, I>(s, images, rule, to, queue);
        return launch_pool_backward<1, I>(s, images, rule, to, queue);
      }
      if (vectors && kind == Selected::kIndex64)
        return launch_pool_backward<n, I>(
            s, images, AddSelected<T, int64_t>{from, static_cast<const int64_t*>(codes.data)}, to,
            queue);
    }
    launch_pool_backward<1, I>(s, images, AddSelectedAny<T>{from, kind, codes.data}, to, queue);
  });
}

void run(const PoolShape& s, DType dtype, Selected kind, const void* dy, const void* selected,
         void* dx, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    run(s, kind, static_cast<const T*>(dy), selected, static_cast<T*>(dx), queue);
  });
}

}  // namespace

void select_pool2d_backward(const PoolProblem& p, Selected kind, const void* dy,
                            const void* selected, void* dx, const Queue& queue) {
  run(pool_shape(p), p.dtype, kind, dy, selected, dx, queue);
}

void adaptive_max_pool2d_backward(const AdaptiveProblem& p, const void* dy, const int64_t* indices,
                                  void* dx, const Queue& queue) {
  run(pool_shape(p), p.dtype, Selected::kIndex64, dy, indices, dx, queue);
}

}  // namespace torchconv::cuda
