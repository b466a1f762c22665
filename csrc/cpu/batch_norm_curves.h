// What batch normalisation does to its result z, and to the gradient that comes for it: a curve has
// value(z), gradient(dy, z), and at(activation, bounds) that makes it.
#pragma once

#include "cpu/activation_math.h"
#include "cpu/batch_norm_channels.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// None, ReLU and ReLU6, between bounds that may be NaN where there is none.
template <typename A>
struct ClampCurve {
  using V = typename Vec<A>::Type;
  V low, high;

  static ClampCurve at(Activation, Bounds bounds) {
    return {Vec<A>::broadcast(static_cast<A>(bounds.low)),
            Vec<A>::broadcast(static_cast<A>(bounds.high))};
  }
  TORCHCONV_INLINE V value(V z) const {
    z = low > z ? low : z;
    return high < z ? high : z;
  }
  // dy, or zero where the activation is constant; for z of NaN it is not. A masked load of dy would
  // wait for x before it so much as began.
  TORCHCONV_INLINE V gradient(V dy, V z) const {
    keep_in_register(dy);
    return (z <= low) | (z >= high) ? V{} : dy;
  }
};

// Any of them, chosen for each vector: for what is not worth kernels of its own, which take long to
// compile.
template <typename A>
struct AnyCurve {
  using V = typename Vec<A>::Type;
  Activation activation;
  ClampCurve<A> clamp;

  static AnyCurve at(Activation activation, Bounds bounds) {
    return {activation, ClampCurve<A>::at(activation, bounds)};
  }
  TORCHCONV_INLINE V value(V z) const {
    switch (activation) {
      case Activation::kSiLU:
        return VectorMath<A>::silu(z);
      case Activation::kHardswish:
        return VectorMath<A>::hardswish(z);
      default:
        return clamp.value(z);
    }
  }
  TORCHCONV_INLINE V gradient(V dy, V z) const {
    switch (activation) {
      case Activation::kSiLU:
        return VectorMath<A>::silu_gradient(dy, z);
      case Activation::kHardswish:
        return VectorMath<A>::hardswish_gradient(dy, z);
      default:
        return clamp.gradient(dy, z);
    }
  }
};

// Kernel<T, Curve>(p, arguments).run() for the problem's type and activation.
template <template <typename T, typename Curve> class Kernel, typename Arguments>
void run_kernel(const BatchNormProblem& p, const Arguments& a) {
  const bool clamps = p.activation != Activation::kSiLU && p.activation != Activation::kHardswish;
  switch (p.dtype) {
    case DType::kFloat64:
      return Kernel<double, AnyCurve<double>>(p, a).run();
    case DType::kBFloat16:
      return Kernel<BFloat16, AnyCurve<float>>(p, a).run();
    case DType::kFloat16:
      return Kernel<Float16, AnyCurve<float>>(p, a).run();
    default:
      return clamps ? Kernel<float, ClampCurve<float>>(p, a).run()
                    : Kernel<float, AnyCurve<float>>(p, a).run();
  }
}

}  // namespace torchconv::cpu
