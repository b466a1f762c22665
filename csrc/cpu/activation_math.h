// exp and its relatives over the lanes of a vector, without branches or tables. A is float or
// double; results are within a few units in the last place, infinities and zeros are reached where
// they should be and NaN stays NaN.
//
// exp: x = n*ln2 + r with |r| <= ln2/2 (Cody and Waite's two-part ln2), a polynomial in r (float:
// fitted to relative 3e-9; double: Taylor's), and 2^n put together from its bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  using UnsignedBits = uint32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // exp is 0 and inf beyond
  static constexpr float kNormal = 88.37f;  // exp(x) is 2^127 and a fraction at most up to here
  static constexpr int kMantissa = 23, kBias = 127;
  // (exp(r) - 1 - r) / r^2, from the constant term on.
  static constexpr float kSeries[] = {0.499999934f, 0.166665204f, 0.0416683908f, 0.00836874511f,
                                      0.00138145401f};
};
template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  using UnsignedBits = uint64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kNormal = 709.43;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kSeries[] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// A vector of A and what its functions are made of.
template <typename A>
struct VectorMath {
  using Constants = ExpConstants<A>;
  using V = typename Vec<A>::Type;
  using Bits = typename Vec<typename Constants::Bits>::Type;
  using UnsignedBits = typename Vec<typename Constants::UnsignedBits>::Type;

  static TORCHCONV_INLINE V broadcast(A x) { return Vec<A>::broadcast(x); }
  static TORCHCONV_INLINE UnsignedBits sign() { return bit_cast<UnsignedBits>(broadcast(A{-0.0})); }
  static TORCHCONV_INLINE V abs(V x) { return bit_cast<V>(bit_cast<UnsignedBits>(x) & ~sign()); }
  // NaN passes through both.
  static TORCHCONV_INLINE V at_least(V x, A low) {
    const V bound = broadcast(low);
    return x < bound ? bound : x;
  }
  static TORCHCONV_INLINE V at_most(V x, A high) {
    const V bound = broadcast(high);
    return x > bound ? bound : x;
  }

  // From the constant term on.
  template <int kTerms>
  static TORCHCONV_INLINE V polynomial(V x, const A (&terms)[kTerms]) {
    V sum = broadcast(terms[kTerms - 1]);
#pragma GCC unroll 16
    for (int k = kTerms - 2; k >= 0; --k) sum = sum * x + terms[k];
    return sum;
  }

  // exp(x) = (1 + tail) * low * high, with tail = exp(r) - 1 and powers of two that do not
  // overflow.
  struct Exp {
    V tail, low, high;
    TORCHCONV_INLINE V value() const { return (low + low * tail) * high; }
  };

  static TORCHCONV_INLINE Exp exp(V x) {
    x = at_most(at_least(x, Constants::kLowest), Constants::kHighest);
    const V round = broadcast(Constants::kRound);
    const V rounded = x * A(1.44269504088896340736) + round;
    const V n = rounded - round;
    const V r = (x - n * Constants::kLn2High) - n * Constants::kLn2Low;
    const V series = polynomial(r, Constants::kSeries);
    const Bits whole = bit_cast<Bits>(rounded) - bit_cast<Bits>(round);
    const Bits half = whole >> 1;
    return {r + r * r * series, power(half), power(whole - half)};
  }

  // Where exp(-x) is beyond its range here, zero; SiLU's of -inf is NaN, as PyTorch's.
  static TORCHCONV_INLINE V sigmoid(V x) {
    return x < -Constants::kNormal ? V{} : A{1} / one_and_exp_of_negative(x);
  }
  static TORCHCONV_INLINE V silu(V x) {
    return x < -Constants::kNormal ? x * A{0} : x / one_and_exp_of_negative(x);
  }

  // dy times the derivative.
  static TORCHCONV_INLINE V silu_gradient(V dy, V x) {
    const V s = sigmoid(x);
    return dy * (s * (A{1} + x * (A{1} - s)));
  }

  static TORCHCONV_INLINE V hardswish(V x) {
    return x * at_most(at_least(x + A{3}, 0), 6) * A(1.0 / 6);
  }
  // dy at NaN, as in PyTorch.
  static TORCHCONV_INLINE V hardswish_gradient(V dy, V x) {
    const V rising = x < A{3} ? dy * (x * A(1.0 / 3) + A(0.5)) : dy;
    return x <= A{-3} ? V{} : rising;
  }

  // tanh(|x|) = -m / (2 + m) with m = exp(-2|x|) - 1, which does not cancel.
  static TORCHCONV_INLINE V tanh(V x) {
    const Exp e = exp(A{-2} * abs(x));
    const V scale = e.low * e.high;
    const V m = scale * e.tail + (scale - A{1});
    const V magnitude = abs(m / (A{2} + m));
    return bit_cast<V>(bit_cast<UnsignedBits>(magnitude) | (bit_cast<UnsignedBits>(x) & sign()));
  }

  // x * P(X <= x) of the normal distribution, NaN of -inf as in PyTorch: in float a rational
  // function of x^2 times x in the place of P - 1/2, within 2.2e-7 |x| (PyTorch: 3.5e-7 |x|), which
  // takes half the time of exp.
  static TORCHCONV_INLINE V gelu(V x) {
    if constexpr (sizeof(A) == sizeof(double)) {
      return x * normal_cdf(x);
    } else {
      constexpr float kEnd = 5.4f;  // half of float's resolution away from 0 and 1
      const V inner = at_most(at_least(x, -kEnd), kEnd), square = inner * inner;
      constexpr float kP[] = {3.98942232e-01f, 3.33722495e-02f, 4.65085218e-03f,
                              1.64321886e-04f, 6.36002005e-06f, 2.33867148e-08f};
      constexpr float kQ[] = {
          1.0f,           2.50317901e-01f, 2.83786990e-02f, 1.85898261e-03f, 7.24002384e-05f,
          1.21659037e-06f};
      const V product = x * (0.5f + inner * polynomial(square, kP) / polynomial(square, kQ));
      return x < -kEnd ? x * A{0} : product;
    }
  }

  // Its derivative, P(X <= x) + x times the density: in float as above, within 2.3e-7. NaN where x
  // is infinite, as in PyTorch.
  static TORCHCONV_INLINE V gelu_derivative(V x) {
    if constexpr (sizeof(A) == sizeof(double)) {
      const V density = A(0.39894228040143267794) * exp(A(-0.5) * x * x).value();
      return normal_cdf(x) + x * density;
    } else {
      constexpr float kEnd = 5.8f;
      const V inner = at_most(at_least(x, -kEnd), kEnd), square = inner * inner;
      constexpr float kP[] = {7.97884524e-01f, -2.60038208e-02f, 1.40003916e-02f, 1.37187322e-04f,
                              3.40738334e-05f, 7.50259517e-07f,  1.58299382e-08f};
      constexpr float kQ[] = {1.0f,
                              3.00742149e-01f,
                              4.27949466e-02f,
                              3.78510845e-03f,
                              2.28991630e-04f,
                              9.45298780e-06f,
                              2.92464449e-07f,
                              1.28649924e-09f};
      const V derivative = 0.5f + inner * polynomial(square, kP) / polynomial(square, kQ);
      return (x < -kEnd ? V{} : derivative) + (x - x);
    }
  }

  // P(X <= x) of the normal distribution, in double.
  static TORCHCONV_INLINE V normal_cdf(V x) {
    V cdf{};
    for (int lane = 0; lane < Vec<A>::kLanes; ++lane)
      cdf[lane] = 0.5 * std::erfc(-x[lane] * 0.70710678118654752440);
    return cdf;
  }

 private:
  // 1 + exp(-x) for x >= -kNormal, and for smaller ones anything. Nothing here leaves the normal
  // numbers, so exp takes one power of two, which comes out of the rounding with its bias.
  static TORCHCONV_INLINE V one_and_exp_of_negative(V x) {
    constexpr A kRound = Constants::kRound + Constants::kBias;
    const V inner = at_most(x, Constants::kNormal);
    const V rounded = inner * A(-1.44269504088896340736) + kRound;
    const V n = rounded - kRound;
    const V r = (-inner - n * Constants::kLn2High) - n * Constants::kLn2Low;
    const V fraction = (polynomial(r, Constants::kSeries) * r + A{1}) * r + A{1};
    const V scale = bit_cast<V>(bit_cast<UnsignedBits>(rounded) << Constants::kMantissa);
    return scale * fraction + A{1};
  }

  // Unsigned, because the bits of a NaN make any e.
  static TORCHCONV_INLINE V power(Bits e) {
    return bit_cast<V>(bit_cast<UnsignedBits>(e + Constants::kBias) << Constants::kMantissa);
  }
};

}  // namespace torchconv::cpu
