// Average pooling's backward: every element of a window receives dy over the window's divisor. The
// kernel is in avg_pool2d_rows.h; planes with one output, and with windows side by side, are
// written here. As of sums that begin at 0, no element's gradient is -0.
#include "cpu/avg_pool2d_rows.h"
#include "cpu/pool2d.h"

namespace torchconv::cpu {
namespace {

// `count` elements of one value from `to` on. The last vector may spill into elements before
// `last`, which are written after it.
template <typename T>
TORCHCONV_INLINE void fill_run(Wide<T> value, int64_t count, const T* last, T* to) {
  using W = WideVec<T>;
  const auto all = W::broadcast(value);
  for (int64_t i = 0; i < count; i += W::kLanes) {
    if (last - (to + i) >= W::kLanes) {
      W::store(to + i, all);
    } else {
      W::store_partial(to + i, all, count - i);
    }
  }
}

// Of the first window, whose divisor others share.
template <typename T>
Wide<T> divisor_of(const PoolProblem& p) {
  return static_cast<Wide<T>>(vertical_factor(p, vertical_axis(p), 0) *
                              horizontal_factor(p, horizontal_axis(p), 0));
}

// Planes (NCHW) with one output, whose window covers them: each is one value.
template <typename T>
void spread_planes(const PoolProblem& p, const T* dy, T* dx, const Parallel& pool) {
  const int64_t elements = p.H * p.W;
  const Wide<T> divisor = divisor_of<T>(p);
  const int64_t grain = pool_grain(elements * static_cast<int64_t>(sizeof(T)));
  parallel_for(pool, 0, p.N * p.C, grain, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; plane++)
      fill_run<T>(Wide<T>{0} + to_wide<T>(dy[plane]) / divisor, elements, dx + end * elements,
                  dx + plane * elements);
  });
}

// Windows side by side inside the image, wide ones (two columns merge in registers, see
// pool2d_backward_rows.h), of gradients that stay in cache (those past it are streamed by rows).
bool windows_tile(const PoolProblem& p, int64_t element_size) {
  return p.stride_h == p.R && p.stride_w == p.S && p.S > 2 && p.pad_h == 0 && p.pad_w == 0 &&
         p.dilation_h == 1 && p.dilation_w == 1 && p.P * p.R <= p.H && p.Q * p.S <= p.W &&
         !writes_past_cache(p, element_size);
}

// Planes (NCHW) of such windows: a row is a run of S equal elements for each output column, and
// zeros past the last; R rows are alike.
template <typename T>
void spread_tiles(const PoolProblem& p, const T* dy, T* dx, const Parallel& pool) {
  using Lane = Wide<T>;
  const int64_t elements = p.H * p.W, covered = p.Q * p.S;
  const Lane divisor = divisor_of<T>(p);
  const int64_t grain = pool_grain(elements * static_cast<int64_t>(sizeof(T)));
  parallel_for_with_scratch(pool, 0, p.N * p.C, grain, [&](int64_t begin, int64_t end) {
    const Buffer<Lane> values(p.Q);
    const T* const last = dx + end * elements;
    for (int64_t plane = begin; plane < end; plane++) {
      T* row = dx + plane * elements;
      const T* from = dy + plane * p.P * p.Q;
      for (int64_t i = 0; i < p.P; i++, from += p.Q) {
        for (int64_t q = 0; q < p.Q; q++) values[q] = Lane{0} + to_wide<T>(from[q]) / divisor;
        for (int64_t r = 0; r < p.R; r++, row += p.W) {
          for (int64_t q = 0; q < p.Q; q++) fill_run<T>(values[q], p.S, last, row + q * p.S);
          fill_run<T>(Lane{0}, p.W - covered, last, row + covered);
        }
      }
      fill_run<T>(Lane{0}, (p.H - p.P * p.R) * p.W, last, row);
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
    spread_planes(p, dy, dx, pool);
  } else if (!runs_channels_last(p) && windows_tile(p, sizeof(T))) {
    spread_tiles(p, dy, dx, pool);
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
