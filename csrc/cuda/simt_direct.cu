// The convolution by plain loops: fprop and dgrad a thread for each output element, in the order of
// memory; wgrad a block for each weight, whose threads share the pixels. I is the type of indices.
// Bound by the reads, which the caches serve. Float sums are added up 256 terms at a time, integers
// in an unsigned type of at least their width, so that they wrap around without overflow.
#include <algorithm>
#include <type_traits>

#include "cuda/activation.h"
#include "cuda/simt_direct.h"
#include "cuda/simt_view.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 256;

template <typename I>
struct Strides {
  I n, c, row, column;
};

template <typename I>
struct Direct {
  I N, C, H, W, K, R, S, P, Q;  // channels are those of a group
  I groups;
  I stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  Strides<I> x, z, w;  // w: of k, c, r and s
  bool channels_last, weight_channels_last, flip;

  explicit Direct(const ConvProblem& p)
      : N(I(p.N)),
        C(I(p.C / p.groups)),
        H(I(p.H)),
        W(I(p.W)),
        K(I(p.K / p.groups)),
        R(I(p.R)),
        S(I(p.S)),
        P(I(p.P)),
        Q(I(p.Q)),
        groups(I(p.groups)),
        stride_h(I(p.stride_h)),
        stride_w(I(p.stride_w)),
        pad_top(I(p.pad_top)),
        pad_left(I(p.pad_left)),
        dilation_h(I(p.dilation_h)),
        dilation_w(I(p.dilation_w)),
        channels_last(p.layout == Layout::kNHWC),
        weight_channels_last(p.weight_layout == Layout::kNHWC),
        flip(p.flip) {
    const SimtStrides image = image_strides(p.layout, p.C, p.H, p.W);
    const SimtStrides out = image_strides(p.layout, p.K, p.P, p.Q);
    const SimtWeightStrides weight = weight_strides(p);
    x = {I(image.n), I(image.c), I(image.row), I(image.column)};
    z = {I(out.n), I(out.c), I(out.row), I(out.column)};
    w = {I(weight.k), I(weight.c), I(weight.r), I(weight.s)};
  }
  __device__ __forceinline__ I tap(I r, I s) const {
    return (flip ? R - 1 - r : r) * w.row + (flip ? S - 1 - s : s) * w.column;
  }
};

// f(Direct<I>) with the type of indices that holds every size and sum of sizes.
template <typename F>
void with_direct(const ConvProblem& p, F&& f) {
  const int64_t most = int64_t{1} << 30;
  if (simt_fits(p) && p.stride_h < most && p.stride_w < most && p.dilation_h < most &&
      p.dilation_w < most && p.N * p.C * p.H * p.W < most && p.N * p.K * p.P * p.Q < most &&
      p.K * (p.C / p.groups) * p.R * p.S < most)
    return f(Direct<int>(p));
  f(Direct<int64_t>(p));
}

// A float sum in two levels; of integers simply the sum.
template <typename T>
class DirectSum {
  static constexpr bool kFloat = std::is_floating_point_v<Wide<T>>;

 public:
  using Value =
      std::conditional_t<kFloat, Wide<T>, std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>>;

  __device__ __forceinline__ void add(T a, T b) {
    if constexpr (kFloat) {
      sum_ = fma(to_wide(a), to_wide(b), sum_);
      if (++terms_ == 256) total_ += sum_, sum_ = 0, terms_ = 0;
    } else {
      sum_ += static_cast<Value>(a) * static_cast<Value>(b);
    }
  }
  __device__ __forceinline__ Value value() const {
    if constexpr (kFloat) return static_cast<Value>(total_ + sum_);
    return sum_;
  }
  // Of float sums, which may be many.
  __device__ __forceinline__ double wide() const { return static_cast<double>(total_) + sum_; }

 private:
  Value sum_ = 0;
  std::conditional_t<std::is_same_v<Value, float>, double, Value> total_ = 0;
  int terms_ = 0;
};

// index becomes n; c, h and w are those of the element at index in a dense image.
template <typename I>
__device__ __forceinline__ void split(bool channels_last, I C, I H, I W, I& index, I& c, I& h,
                                      I& w) {
  if (channels_last) c = index % C, index /= C;
  w = index % W, index /= W;
  h = index % H, index /= H;
  if (!channels_last) c = index % C, index /= C;
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, 3)
    direct_fprop(const __grid_constant__ Direct<I> d, const T* x, const T* w, Epilogue<T> e) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= int64_t{d.N} * d.groups * d.K * d.P * d.Q) return;
  I n = static_cast<I>(at), k, i, j;
  split(d.channels_last, d.groups * d.K, d.P, d.Q, n, k, i, j);
  const T* image = x + n * d.x.n + k / d.K * d.C * d.x.c;
  DirectSum<T> sum;
  for (I r = 0; r < d.R; ++r) {
    const I h = i * d.stride_h - d.pad_top + r * d.dilation_h;
    if (h < 0 || h >= d.H) continue;
    for (I s = 0; s < d.S; ++s) {
      const I column = j * d.stride_w - d.pad_left + s * d.dilation_w;
      if (column < 0 || column >= d.W) continue;
      const T* source = image + h * d.x.row + column * d.x.column;
      const T* weight = w + k * d.w.n + d.tap(r, s);
      for (I c = 0; c < d.C; ++c) sum.add(source[c * d.x.c], weight[c * d.w.c]);
    }
  }
  if constexpr (std::is_floating_point_v<Wide<T>>) {
    e.store(sum.value() + e.bias_of(k), at);
  } else {
    using Value = typename DirectSum<T>::Value;
    const Value bias = e.bias == nullptr ? Value{0} : static_cast<Value>(e.bias[k]);
    const T z = static_cast<T>(sum.value() + bias);
    if (e.preactivation != nullptr) e.preactivation[at] = z;
    e.y[at] = z;
  }
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, 3)
    direct_dgrad(const __grid_constant__ Direct<I> d, const T* dz, const T* w, T* dx) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= int64_t{d.N} * d.groups * d.C * d.H * d.W) return;
  I n = static_cast<I>(at), c, h, column;
  split(d.channels_last, d.groups * d.C, d.H, d.W, n, c, h, column);
  const I group = c / d.C;
  const T* image = dz + n * d.z.n + group * d.K * d.z.c;
  const T* filters = w + group * d.K * d.w.n + (c - group * d.C) * d.w.c;
  DirectSum<T> sum;
  for (I r = 0; r < d.R; ++r) {
    // h = i*stride - pad + r*dilation
    const I rows = h + d.pad_top - r * d.dilation_h, i = rows / d.stride_h;
    if (rows < 0 || i * d.stride_h != rows || i >= d.P) continue;
    for (I s = 0; s < d.S; ++s) {
      const I columns = column + d.pad_left - s * d.dilation_w, j = columns / d.stride_w;
      if (columns < 0 || j * d.stride_w != columns || j >= d.Q) continue;
      const T* source = image + i * d.z.row + j * d.z.column;
      const T* weight = filters + d.tap(r, s);
      for (I k = 0; k < d.K; ++k) sum.add(source[k * d.z.c], weight[k * d.w.n]);
    }
  }
  dx[at] = from_wide<T>(sum.value());
}

template <typename T, typename I>
__global__ void __launch_bounds__(kThreads, 3)
    direct_wgrad(const __grid_constant__ Direct<I> d, const T* dz, const T* x, T* dw) {
  __shared__ double sums[kThreads];
  const int64_t at = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  if (at >= int64_t{d.groups} * d.K * d.C * d.R * d.S) return;
  I k = static_cast<I>(at), c, r, s;
  split(d.weight_channels_last, d.C, d.R, d.S, k, c, r, s);
  const I row = (d.flip ? d.R - 1 - r : r) * d.dilation_h - d.pad_top;
  const I column = (d.flip ? d.S - 1 - s : s) * d.dilation_w - d.pad_left;
  const T* gradient = dz + k * d.z.c;
  const T* image = x + (k / d.K * d.C + c) * d.x.c;
  DirectSum<T> sum;
  const I pixels = d.N * d.P * d.Q;
  for (I pixel = threadIdx.x; pixel < pixels; pixel += kThreads) {
    const I j = pixel % d.Q, rest = pixel / d.Q, i = rest % d.P, n = rest / d.P;
    const I h = i * d.stride_h + row, w = j * d.stride_w + column;
    if (h < 0 || h >= d.H || w < 0 || w >= d.W) continue;
    sum.add(gradient[n * d.z.n + i * d.z.row + j * d.z.column],
            image[n * d.x.n + h * d.x.row + w * d.x.column]);
  }
  sums[threadIdx.x] = sum.wide();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(half)) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) dw[at] = from_wide<T>(static_cast<Wide<T>>(sums[0]));
}

dim3 blocks_of(int64_t elements) {
  return dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads));
}

}  // namespace

void simt_direct_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                       const void* residual, void* y, void* preactivation, const Queue& queue) {
  with_element(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(y),
                               static_cast<T*>(preactivation), p.activation,
                               static_cast<const T*>(residual)};
    with_direct(p, [&](const auto& direct) {
      using I = decltype(direct.N);
      launch(direct_fprop<T, I>, blocks_of(p.N * p.K * p.P * p.Q), kThreads, 0, queue, direct,
             static_cast<const T*>(x), static_cast<const T*>(w), epilogue);
    });
  });
}

void simt_direct_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                       const Queue& queue) {
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_direct(p, [&](const auto& direct) {
      using I = decltype(direct.N);
      launch(direct_dgrad<T, I>, blocks_of(p.N * p.C * p.H * p.W), kThreads, 0, queue, direct,
             static_cast<const T*>(dz), static_cast<const T*>(w), static_cast<T*>(dx));
    });
  });
}

void simt_direct_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                       const Queue& queue) {
  with_float(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    with_direct(p, [&](const auto& direct) {
      using I = decltype(direct.N);
      const int64_t weights = p.K * (p.C / p.groups) * p.R * p.S;
      const int64_t side = std::min<int64_t>(weights, 0x7fffffff);
      launch(direct_wgrad<T, I>,
             dim3(static_cast<unsigned>(side), static_cast<unsigned>((weights + side - 1) / side)),
             kThreads, 0, queue, direct, static_cast<const T*>(dz), static_cast<const T*>(x),
             static_cast<T*>(dw));
    });
  });
}

}  // namespace torchconv::cuda
