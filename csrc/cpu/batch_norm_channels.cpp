// Statistics, parameters and gradients by channel: see batch_norm_channels.h.
#include "cpu/batch_norm_channels.h"

#include <cmath>
#include <limits>

#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

double element(const void* array, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return static_cast<const double*>(array)[i];
    case DType::kBFloat16:
      return to_wide(static_cast<const BFloat16*>(array)[i]);
    case DType::kFloat16:
      return to_wide(static_cast<const Float16*>(array)[i]);
    default:
      return static_cast<const float*>(array)[i];
  }
}

void set_element(void* array, DType type, int64_t i, double value) {
  const auto single = static_cast<float>(value);
  switch (type) {
    case DType::kFloat64:
      static_cast<double*>(array)[i] = value;
      return;
    case DType::kBFloat16:
      static_cast<BFloat16*>(array)[i] = from_wide<BFloat16>(single);
      return;
    case DType::kFloat16:
      static_cast<Float16*>(array)[i] = from_wide<Float16>(single);
      return;
    default:
      static_cast<float*>(array)[i] = single;
  }
}

double elements_of_channel(const BatchNormProblem& p) {
  return static_cast<double>(p.N) * static_cast<double>(p.H) * static_cast<double>(p.W);
}

void follow(void* running, const BatchNormProblem& p, int64_t channel, double value,
            double momentum) {
  const double old = element(running, p.parameters, channel);
  set_element(running, p.parameters, channel, momentum * value + (1 - momentum) * old);
}

}  // namespace

Statistics batch_statistics(const BatchNormProblem& p, int64_t channel, Moments m,
                            RunningStatistics running, double eps) {
  const double n = elements_of_channel(p), part = m.sum / n;
  const double deviation = m.squares - m.sum * part;
  const double squares = deviation < 0 ? 0 : deviation;  // by rounding; NaN stays
  const double mean = m.shift + part;
  if (running.mean != nullptr) follow(running.mean, p, channel, mean, running.momentum);
  if (running.var != nullptr) follow(running.var, p, channel, squares / (n - 1), running.momentum);
  return {mean, 1 / std::sqrt(squares / n + eps)};
}

Statistics given_statistics(const BatchNormProblem& p, int64_t channel, const void* mean,
                            const void* var, double eps) {
  return {element(mean, p.parameters, channel),
          1 / std::sqrt(element(var, p.parameters, channel) + eps)};
}

Affine affine_of(const BatchNormProblem& p, int64_t channel, Statistics s,
                 BatchNormWeights weights) {
  const auto of = [&](const void* array, double otherwise) {
    return array == nullptr ? otherwise : element(array, p.parameters, channel);
  };
  const double shift = p.dtype == DType::kFloat64 ? s.mean : static_cast<float>(s.mean);
  const double scale = of(weights.weight, 1) * s.invstd;
  return {shift, scale, of(weights.bias, 0) - (s.mean - shift) * scale};
}

InputGradient channel_gradients(const BatchNormProblem& p, int64_t channel, Statistics s,
                                Affine affine, double sum, double products, bool training,
                                BatchNormGradients to) {
  const double part = s.mean - affine.shift;
  const double dweight = (products - part * sum) * s.invstd;
  if (to.dweight != nullptr) set_element(to.dweight, p.parameters, channel, dweight);
  if (to.dbias != nullptr) set_element(to.dbias, p.parameters, channel, sum);
  if (!training) return {0, 0};
  const double n = elements_of_channel(p);
  const double slope = -affine.scale * s.invstd * dweight / n;
  return {slope, -affine.scale * sum / n - slope * part};
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
