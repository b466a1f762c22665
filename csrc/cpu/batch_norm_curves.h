// What batch normalisation does to its result z, and to the gradient that comes for it: a curve has
// value(z), gradient(dy, z), and at(bounds) that makes it.
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

  static ClampCurve at(Bounds bounds) {
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

template <typename A>
struct SiLUCurve {
  using V = typename Vec<A>::Type;

  static SiLUCurve at(Bounds) { return {}; }
  static TORCHCONV_INLINE V value(V z) { return VectorMath<A>::silu(z); }
  static TORCHCONV_INLINE V gradient(V dy, V z) { return VectorMath<A>::silu_gradient(dy, z); }
};

template <typename A>
struct HardswishCurve {
  using V = typename Vec<A>::Type;

  static HardswishCurve at(Bounds) { return {}; }
  static TORCHCONV_INLINE V value(V z) { return VectorMath<A>::hardswish(z); }
  static TORCHCONV_INLINE V gradient(V dy, V z) { return VectorMath<A>::hardswish_gradient(dy, z); }
};

template <template <typename T, typename Curve> class Kernel, template <typename> class Curve,
          typename Arguments>
void run_typed(const BatchNormProblem& p, const Arguments& a) {
  switch (p.dtype) {
    case DType::kFloat64:
      return Kernel<double, Curve<double>>(p, a).run();
    case DType::kBFloat16:
      return Kernel<BFloat16, Curve<float>>(p, a).run();
    case DType::kFloat16:
      return Kernel<Float16, Curve<float>>(p, a).run();
    default:
      return Kernel<float, Curve<float>>(p, a).run();
  }
}

// Kernel<T, Curve>(p, arguments).run() for the problem's type and activation.
template <template <typename T, typename Curve> class Kernel, typename Arguments>
void run_kernel(const BatchNormProblem& p, const Arguments& a) {
  switch (p.activation) {
    case Activation::kSiLU:
      return run_typed<Kernel, SiLUCurve>(p, a);
    case Activation::kHardswish:
      return run_typed<Kernel, HardswishCurve>(p, a);
    default:
      return run_typed<Kernel, ClampCurve>(p, a);
  }
}

}  // namespace torchconv::cpu
