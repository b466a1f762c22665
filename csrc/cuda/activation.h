// Activations on the GPU, their derivatives, and what a convolution does with a finished sum.
// Values and derivatives are those of csrc/cpu/activation.h: PyTorch's, with its conventions at the
// kinks (relu'(0) = 0, relu6' = 1 only inside (0, 6)), and NaN stays NaN.
#pragma once

#include "core/types.h"
#include "cuda/element.h"

namespace torchconv::cuda {

// A is float or double.
template <typename A>
__host__ __device__ __forceinline__ A sigmoid(A x) {
  return A{1} / (A{1} + ::exp(-x));
}
template <typename A>
__host__ __device__ __forceinline__ A relu6(A x) {
  const A low = x < A{0} ? A{0} : x;
  return low > A{6} ? A{6} : low;
}
template <typename A>
__host__ __device__ __forceinline__ A normal_cdf(A x) {
  return A(0.5) * ::erfc(x * A(-0.70710678118654752440));
}

template <typename A>
__host__ __device__ __forceinline__ A activate(Activation activation, A x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kReLU:
      return x < A{0} ? A{0} : x;
    case Activation::kReLU6:
      return relu6(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return ::tanh(x);
    case Activation::kSiLU:
      return x * sigmoid(x);
    case Activation::kHardswish:
      return x * relu6(x + A{3}) / A{6};
    case Activation::kGELU:
      return x * normal_cdf(x);
  }
  return x;
}

// dy * g'(z), from y or from z as derivative_needs_preactivation says.
template <typename A>
__host__ __device__ __forceinline__ A times_derivative(Activation activation, A dy, A saved) {
  switch (activation) {
    case Activation::kNone:
      return dy;
    case Activation::kReLU:
      return saved <= A{0} ? A{0} : dy;
    case Activation::kReLU6:
      return saved <= A{0} || saved >= A{6} ? A{0} : dy;
    case Activation::kSigmoid:
      return dy * ((A{1} - saved) * saved);
    case Activation::kTanh:
      return dy * (A{1} - saved * saved);
    case Activation::kSiLU: {
      const A s = sigmoid(saved);
      return dy * (s * (A{1} + saved * (A{1} - s)));
    }
    case Activation::kHardswish:
      if (saved <= A{-3}) return A{0};
      return saved < A{3} ? dy * (saved / A{3} + A(0.5)) : dy;  // one at a NaN, as ReLU's
    case Activation::kGELU: {
      const A density = A(0.39894228040143267794) * ::exp(A(-0.5) * saved * saved);
      return dy * (normal_cdf(saved) + saved * density);
    }
  }
  return dy;
}

// What happens to a finished sum of z: bias, the residual, the pre-activation where it is wanted,
// activation, rounding. A kernel's parameter; all but y may be null. The residual lies as y does;
// not every kernel takes one (conv_choice.cpp).
template <typename T>
struct Epilogue {
  const T* bias;
  T* y;
  T* preactivation;
  Activation activation;
  const T* residual = nullptr;

  __device__ __forceinline__ Wide<T> bias_of(int64_t k) const {
    return bias == nullptr ? Wide<T>{0} : to_wide(bias[k]);
  }

  // z has had its bias. Integers have no activation.
  __device__ __forceinline__ void store(Wide<T> z, int64_t offset) const {
    if (residual != nullptr) z += to_wide(residual[offset]);
    if (preactivation != nullptr) preactivation[offset] = from_wide<T>(z);
    if constexpr (std::is_floating_point_v<Wide<T>>) z = activate(activation, z);
    y[offset] = from_wide<T>(z);
  }
};

}  // namespace torchconv::cuda
