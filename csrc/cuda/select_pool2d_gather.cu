// Reads x where a max or min pooling selected: the adjoint of its backward, for derivatives of
// derivatives. One thread for each output; only the size of elements matters, not their type.
// Bound: bytes moved, of which the scattered reads of x are most.
//
// Selections come from the caller and are not trusted: one that names no element of the image
// reads as 0, the same as a window that selected nothing.
#include "cuda/adaptive_pool2d.h"
#include "cuda/pool2d.h"
#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {
namespace {

template <typename E, typename I>
__global__ void __launch_bounds__(kPoolThreads)
    gather(PoolView<I> v, const E* __restrict__ x, SelectedArray selected, E* __restrict__ y) {
  const I thread = pool_thread<I>();
  if (thread >= v.threads) return;
  const PoolPlace<I> at(v, thread, 1);
  int64_t index = -1;
  if (selected.kind == Selected::kIndex64) {
    index = static_cast<const int64_t*>(selected.data)[thread];
  } else {
    const uint32_t code = load_code(selected, thread);
    const uint32_t width = static_cast<uint32_t>(v.w.taps), r = code / width, s = code % width;
    const WindowTaps<I> rows = v.h.window(at.row), columns = v.w.window(at.column);
    const int64_t down = static_cast<int64_t>(r) - rows.tap;
    const int64_t right = static_cast<int64_t>(s) - columns.tap;
    if (down >= 0 && down < rows.count && right >= 0 && right < columns.count)
      index =
          (rows.element + down * v.h.dilation) * v.w.size + columns.element + right * v.w.dilation;
  }
  const int64_t pixels = static_cast<int64_t>(v.h.size) * v.w.size;
  y[thread] =
      index >= 0 && index < pixels ? x[(at.image * pixels + index) * v.channels + at.c] : E{0};
}

template <typename E>
void run(const PoolShape& s, Selected kind, const void* x, const void* selected, void* y,
         const Queue& queue) {
  const int64_t in = s.h.size * s.w.size * s.channels, out = s.h.out * s.w.out * s.channels;
  if (s.images * out == 0) return;
  each_part(s, [&](auto counter, int64_t first, int64_t images) {
    using I = decltype(counter);
    const PoolView<I> view(s, images, 1, true);
    launch(gather<E, I>, pool_grid(view.threads), dim3(kPoolThreads), 0, queue, view,
           static_cast<const E*>(x) + first * in, part_of({kind, selected}, first * out),
           static_cast<E*>(y) + first * out);
  });
}

void run(const PoolShape& s, DType dtype, Selected kind, const void* x, const void* selected,
         void* y, const Queue& queue) {
  switch (dtype) {
    case DType::kUInt8:
    case DType::kInt8:
      return run<uint8_t>(s, kind, x, selected, y, queue);
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
    case DType::kUInt16:
      return run<uint16_t>(s, kind, x, selected, y, queue);
    case DType::kFloat32:
    case DType::kInt32:
      return run<uint32_t>(s, kind, x, selected, y, queue);
    case DType::kFloat64:
    case DType::kInt64:
      return run<uint64_t>(s, kind, x, selected, y, queue);
  }
}

}  // namespace

void select_pool2d_gather(const PoolProblem& p, Selected kind, const void* x, const void* selected,
                          void* y, const Queue& queue) {
  run(pool_shape(p), p.dtype, kind, x, selected, y, queue);
}

void adaptive_max_pool2d_gather(const AdaptiveProblem& p, const void* x, const int64_t* indices,
                                void* y, const Queue& queue) {
  run(pool_shape(p), p.dtype, Selected::kIndex64, x, indices, y, queue);
}

}  // namespace torchconv::cuda
