// Adaptive max pooling's backward, and its adjoint, where the sizes do not divide evenly. Where
// there are images enough to share out, the outputs of each are scattered into it
// (select_pool2d_scatter.h): an index needs no window to be found. Else an element of dx visits the
// outputs whose windows contain it (adaptive_window.h) and adds the gradients of those that
// selected it. Both add in the order of the outputs, to the same bits.
//
// The latter on planes (NCHW): a row of dx takes the output rows that can reach it, each gradient
// going to its column. Pixels (NHWC): vectors over channels. Sums are float for bfloat16 and
// float16, in the order of the outputs. Indices are not trusted: one outside the row or pixel adds
// nothing.
#include <vector>

#include "core/buffer.h"
#include "cpu/adaptive_window.h"
#include "cpu/pool2d.h"
#include "cpu/pool_simd.h"
#include "cpu/select_pool2d_scatter.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

template <typename T>
class AdaptiveMaxBackward {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using V = typename W::Type;
  using C = typename Vec<Code>::Type;
  static constexpr int kLanes = W::kLanes;

 public:
  AdaptiveMaxBackward(const AdaptiveProblem& p, const T* dy, const int64_t* indices, T* dx)
      : p_(p),
        dy_(dy),
        indices_(indices),
        dx_(dx),
        rows_(adaptive_windows(p.P, p.H)),
        columns_(adaptive_windows(p.Q, p.W)) {}

  void run_planes(const Parallel& pool) const {
    const int64_t bytes =
        p_.W * static_cast<int64_t>(sizeof(T)) + largest_window(p_.P, p_.H) * p_.Q * 12;
    parallel_for_with_scratch(pool, 0, p_.N * p_.C * p_.H, pool_grain(bytes),
                              [&](int64_t begin, int64_t end) {
                                const Buffer<Lane> sums(p_.W);
                                for (int64_t i = begin; i < end; i++) plane_row(i, sums.get());
                              });
  }

  void run_pixels(const Parallel& pool) const {
    const int64_t windows = largest_window(p_.P, p_.H) * largest_window(p_.Q, p_.W);
    const int64_t bytes = ceil_div(p_.C, kLanes) * kLanes * (windows + 1) * 8;
    parallel_for(pool, 0, p_.N * p_.H * p_.W, pool_grain(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) pixel(i);
    });
  }

 private:
  // Row i of the N * C * H of dx.
  void plane_row(int64_t i, Lane* sums) const {
    const int64_t h = i % p_.H, plane = i / p_.H;
    std::fill_n(sums, p_.W, Lane{0});
    const Range outputs = at(rows_, h);
    const int64_t end = (plane * p_.P + outputs.end) * p_.Q;
    for (int64_t o = (plane * p_.P + outputs.begin) * p_.Q; o < end; o++) {
      const uint64_t w = static_cast<uint64_t>(indices_[o]) - static_cast<uint64_t>(h * p_.W);
      if (w < static_cast<uint64_t>(p_.W)) sums[w] += to_wide<T>(dy_[o]);
    }
    T* dx = dx_ + i * p_.W;
    int64_t w = 0;
    for (; w + kLanes <= p_.W; w += kLanes) W::store(dx + w, Vec<Lane>::load(sums + w));
    if (w < p_.W) W::store_partial(dx + w, Vec<Lane>::load_partial(sums + w, p_.W - w), p_.W - w);
  }

  // Pixel i of the N * H * W of dx.
  void pixel(int64_t i) const {
    int64_t c = 0;
    for (; c + kLanes <= p_.C; c += kLanes) gather<false>(i, c, kLanes);
    if (c < p_.C) gather<true>(i, c, p_.C - c);
  }

  template <bool kPartial>
  TORCHCONV_INLINE void gather(int64_t i, int64_t c, int64_t n) const {
    using Indices = Vec<int64_t, kLanes>;
    const int64_t position = i % (p_.H * p_.W);
    const int64_t image = i / (p_.H * p_.W) * p_.P;
    const Range rows = at(rows_, position / p_.W), columns = at(columns_, position % p_.W);
    const auto wanted = Indices::broadcast(position);
    V sum{};
    for (int64_t r = rows.begin; r < rows.end; r++) {
      for (int64_t s = columns.begin; s < columns.end; s++) {
        const int64_t from = ((image + r) * p_.Q + s) * p_.C + c;
        const auto selected =
            kPartial ? Indices::load_partial(indices_ + from, n) : Indices::load(indices_ + from);
        const C equal = convert<Code, int64_t, kLanes>(selected == wanted);
        const V v = kPartial ? W::load_partial(dy_ + from, n) : W::load(dy_ + from);
        sum += equal ? v : V{};
      }
    }
    T* dx = dx_ + i * p_.C + c;
    if constexpr (kPartial) {
      W::store_partial(dx, sum, n);
    } else {
      W::store(dx, sum);
    }
  }

  const AdaptiveProblem& p_;
  const T* dy_;
  const int64_t* indices_;
  T* dx_;
  std::vector<Range> rows_, columns_;  // of the outputs, by row and column of dx
};

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
  constexpr int64_t kEnough = 16, kSmall = 4096;
  const T* dy = static_cast<const T*>(grad);
  T* dx = static_cast<T*>(grad_input);
  const PoolProblem problem = without_windows(p);
  using Scatter = ScatterImages<T, const int64_t*>;
  if (Scatter::images(problem) >= kEnough || p.H * p.W <= kSmall)
    return Scatter(problem, dy, indices, dx, true).run(pool);
  const AdaptiveMaxBackward<T> backward(p, dy, indices, dx);
  if (runs_channels_last(p)) {
    backward.run_pixels(pool);
  } else {
    backward.run_planes(pool);
  }
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
