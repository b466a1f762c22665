// Statistics, parameters and gradients by channel: see batch_norm_channels.h.
#include "cpu/batch_norm_channels.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

template <typename T>
void widen(const void* array, Channels c, PerChannel& to) {
  const T* const from = static_cast<const T*>(array) + c.first;
  for (int64_t i = 0; i < c.count; ++i) to[i] = to_wide(from[i]);
}

template <typename T>
void narrow(const double* from, Channels c, void* array) {
  T* const to = static_cast<T*>(array) + c.first;
  for (int64_t i = 0; i < c.count; ++i) to[i] = from_wide<T>(static_cast<Wide<T>>(from[i]));
}

// otherwise: what stands for an array that is not there.
PerChannel elements(const void* array, DType type, Channels c, double otherwise) {
  PerChannel values;
  std::fill_n(values.of, kChannelTile, otherwise);
  if (array == nullptr) return values;
  switch (type) {
    case DType::kFloat64:
      widen<double>(array, c, values);
      break;
    case DType::kBFloat16:
      widen<BFloat16>(array, c, values);
      break;
    case DType::kFloat16:
      widen<Float16>(array, c, values);
      break;
    default:
      widen<float>(array, c, values);
  }
  return values;
}

void set_elements(void* array, DType type, Channels c, const PerChannel& values) {
  if (array == nullptr) return;
  switch (type) {
    case DType::kFloat64:
      return narrow<double>(values.of, c, array);
    case DType::kBFloat16:
      return narrow<BFloat16>(values.of, c, array);
    case DType::kFloat16:
      return narrow<Float16>(values.of, c, array);
    default:
      return narrow<float>(values.of, c, array);
  }
}

// value(i) for each channel.
template <typename F>
TORCHCONV_INLINE PerChannel by_channel(F&& value) {
  PerChannel values;
  for (int i = 0; i < kChannelTile; ++i) values[i] = value(i);
  return values;
}

double elements_of_channel(const BatchNormProblem& p) {
  return static_cast<double>(p.N) * static_cast<double>(p.H) * static_cast<double>(p.W);
}

void follow(void* running, const BatchNormProblem& p, Channels c, const PerChannel& value,
            double momentum) {
  if (running == nullptr) return;
  const PerChannel old = elements(running, p.parameters, c, 0);
  set_elements(running, p.parameters, c,
               by_channel([&](int i) { return momentum * value[i] + (1 - momentum) * old[i]; }));
}

PerChannel inverse_root(const PerChannel& var, double eps) {
  const PerChannel root = by_channel([&](int i) { return std::sqrt(var[i] + eps); });
  return by_channel([&](int i) { return 1 / root[i]; });
}

// By rounding it may be below 0; NaN stays.
PerChannel squared_deviations(const Moments& m, double n) {
  return by_channel([&](int i) {
    const double deviation = m.squares[i] - m.sum[i] * (m.sum[i] / n);
    return deviation < 0 ? 0 : deviation;
  });
}

}  // namespace

Statistics batch_statistics(const BatchNormProblem& p, Channels c, const Moments& m,
                            RunningStatistics running, double eps) {
  const double n = elements_of_channel(p);
  const PerChannel squares = squared_deviations(m, n);
  const PerChannel mean = by_channel([&](int i) { return m.shift[i] + m.sum[i] / n; });
  follow(running.mean, p, c, mean, running.momentum);
  follow(running.var, p, c, by_channel([&](int i) { return squares[i] / (n - 1); }),
         running.momentum);
  return {mean, inverse_root(by_channel([&](int i) { return squares[i] / n; }), eps)};
}

Statistics given_statistics(const BatchNormProblem& p, Channels c, const void* mean,
                            const void* var, double eps) {
  return {elements(mean, p.parameters, c, 0), inverse_root(elements(var, p.parameters, c, 0), eps)};
}

bool near_enough(const BatchNormProblem& p, Channels c, const Moments& m) {
  constexpr double kDeviations = 2, kMost = 1e36, kLeast = 1e-30;
  const double n = elements_of_channel(p);
  const PerChannel squares = squared_deviations(m, n);
  const PerChannel excess = by_channel(
      [&](int i) { return m.sum[i] * (m.sum[i] / n) - kDeviations * kDeviations * squares[i]; });
  bool near = true;
  for (int64_t i = 0; i < c.count; ++i)
    near &= excess[i] <= 0 && m.squares[i] < kMost && !(m.squares[i] < kLeast && m.squares[i] > 0);
  return near;
}

Affine affine_of(const BatchNormProblem& p, Channels c, const Statistics& s,
                 BatchNormWeights weights) {
  const PerChannel weight = elements(weights.weight, p.parameters, c, 1);
  const PerChannel bias = elements(weights.bias, p.parameters, c, 0);
  const PerChannel shift = p.dtype == DType::kFloat64 ? s.mean : by_channel([&](int i) {
    return static_cast<double>(static_cast<float>(s.mean[i]));
  });
  const PerChannel scale = by_channel([&](int i) { return weight[i] * s.invstd[i]; });
  return {shift, scale,
          by_channel([&](int i) { return bias[i] - (s.mean[i] - shift[i]) * scale[i]; })};
}

InputGradient channel_gradients(const BatchNormProblem& p, Channels c, const Statistics& s,
                                const Affine& affine, const double* sums, const double* products,
                                bool training, BatchNormGradients to) {
  const double n = elements_of_channel(p);
  PerChannel sum{}, product{};
  std::copy_n(sums, c.count, sum.of);
  std::copy_n(products, c.count, product.of);
  const PerChannel part = by_channel([&](int i) { return s.mean[i] - affine.shift[i]; });
  const PerChannel dweight =
      by_channel([&](int i) { return (product[i] - part[i] * sum[i]) * s.invstd[i]; });
  set_elements(to.dweight, p.parameters, c, dweight);
  set_elements(to.dbias, p.parameters, c, sum);
  if (!training) return {};
  const PerChannel slope =
      by_channel([&](int i) { return -affine.scale[i] * s.invstd[i] * dweight[i] / n; });
  return {slope,
          by_channel([&](int i) { return -affine.scale[i] * sum[i] / n - slope[i] * part[i]; })};
}

Bounds activation_bounds(Activation activation) {
  return {activation == Activation::kNone ? kNone : 0,
          activation == Activation::kReLU6 ? 6 : kNone};
}

Bounds unrounded_bounds(const BatchNormProblem& p) {
  const Bounds b = activation_bounds(p.activation);
  // Half the smallest number, and half a step below 6: both are rounded to the even side, the
  // bound.
  if (p.dtype == DType::kBFloat16) return {b.low + std::ldexp(1, -134), b.high - std::ldexp(1, -6)};
  if (p.dtype == DType::kFloat16) return {b.low + std::ldexp(1, -25), b.high - std::ldexp(1, -9)};
  return b;
}

}  // namespace torchconv::cpu
