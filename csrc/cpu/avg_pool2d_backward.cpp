// Average pooling's backward: every element of a window receives dy over the window's divisor. The
// kernel is in avg_pool2d_rows.h; planes with one output, and with windows side by side, are
// written here. As of sums that begin at 0, no element's gradient is -0.
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
      const auto value = W::broadcast(Wide<T>{0} + to_wide<T>(dy[plane]) / divisor);
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

// Windows side by side inside the image, wide ones (two columns merge in registers, see
// pool2d_backward_rows.h), of gradients that stay in cache (those past it are streamed by rows).
bool tiles(const PoolProblem& p, int64_t element_size) {
  return p.stride_h == p.R && p.stride_w == p.S && p.S > 2 && p.pad_h == 0 && p.pad_w == 0 &&
         p.dilation_h == 1 && p.dilation_w == 1 && p.P * p.R <= p.H && p.Q * p.S <= p.W &&
         !writes_past_cache(p, element_size);
}

// Planes (NCHW) of such windows: a row is a run of S equal elements for each output column, and
// zeros past the last; R rows are alike. Runs are written left to right, row after row, so that a
// run's last vector may spill into what is written after it.
template <typename T>
class Tiles {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  static constexpr int kLanes = W::kLanes;

 public:
  Tiles(const PoolProblem& p, const T* dy, T* dx)
      : p_(p),
        dy_(dy),
        dx_(dx),
        divisor_(static_cast<Lane>(vertical_factor(p, vertical_axis(p), 0) *
                                   horizontal_factor(p, horizontal_axis(p), 0))) {}

  void run(const Parallel& pool) const {
    const int64_t elements = p_.H * p_.W;
    const int64_t grain = pool_grain(elements * static_cast<int64_t>(sizeof(T)));
    parallel_for_with_scratch(pool, 0, p_.N * p_.C, grain, [&](int64_t begin, int64_t end) {
      const Buffer<Lane> values(p_.Q);
      const T* const last = dx_ + end * elements;
      for (int64_t plane = begin; plane < end; plane++) {
        T* row = dx_ + plane * elements;
        const T* from = dy_ + plane * p_.P * p_.Q;
        for (int64_t p = 0; p < p_.P; p++, from += p_.Q) {
          for (int64_t q = 0; q < p_.Q; q++) values[q] = Lane{0} + to_wide<T>(from[q]) / divisor_;
          for (int64_t r = 0; r < p_.R; r++, row += p_.W) write_row(values.get(), last, row);
        }
        fill(Lane{0}, (p_.H - p_.P * p_.R) * p_.W, last, row);
      }
    });
  }

 private:
  void write_row(const Lane* values, const T* last, T* row) const {
    for (int64_t q = 0; q < p_.Q; q++) fill(values[q], p_.S, last, row + q * p_.S);
    fill(Lane{0}, p_.W - p_.Q * p_.S, last, row + p_.Q * p_.S);
  }

  TORCHCONV_INLINE void fill(Lane value, int64_t count, const T* last, T* to) const {
    const auto all = W::broadcast(value);
    for (int64_t i = 0; i < count; i += kLanes) {
      if (last - (to + i) >= kLanes) {
        W::store(to + i, all);
      } else {
        W::store_partial(to + i, all, count - i);
      }
    }
  }

  const PoolProblem& p_;
  const T* dy_;
  T* dx_;
  Lane divisor_;
};

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
  } else if (!runs_channels_last(p) && tiles(p, sizeof(T))) {
    Tiles<T>(p, dy, dx).run(pool);
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
