// exp and its relatives without branches or tables, so that the compiler vectorises a plain loop
// over them for each instruction set. T is float or double; results are within a few units in the
// last place, infinities and zeros are reached where they should be and NaN stays NaN.
//
// exp: x = n*ln2 + r with |r| <= ln2/2 (Cody and Waite's two-part ln2), Taylor's series in r, and
// 2^n put together from its bits. The normal distribution function in float is exp(-a^2) times a
// polynomial in 1/(1 + a/2), fitted by Chebyshev interpolation to relative 3e-8.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/simd.h"

namespace torchconv::cpu {

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Bits = int32_t;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;  // exp is 0 and inf beyond
  static constexpr int kMantissa = 23, kBias = 127, kTerms = 7;
};
template <>
struct ExpConstants<double> {
  using Bits = int64_t;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr int kMantissa = 52, kBias = 1023, kTerms = 13;
};

// exp(x) = (1 + tail) * low * high, with tail = exp(r) - 1 and powers of two that do not overflow.
template <typename T>
struct ExpParts {
  T tail, low, high;
};

template <typename T>
TORCHCONV_INLINE ExpParts<T> exp_parts(T x) {
  using Constants = ExpConstants<T>;
  using Bits = typename Constants::Bits;
  x = x < Constants::kLowest ? Constants::kLowest : x;
  x = x > Constants::kHighest ? Constants::kHighest : x;
  const T rounded = x * T(1.44269504088896340736) + Constants::kRound;
  const T n = rounded - Constants::kRound;
  const T r = (x - n * Constants::kLn2High) - n * Constants::kLn2Low;
  T series = T{1};
#pragma GCC unroll 16
  for (int k = Constants::kTerms; k > 1; --k) series = T{1} + series * (r * (T{1} / T(k)));
  const Bits whole = bit_cast<Bits>(rounded) - bit_cast<Bits>(T{Constants::kRound});
  const Bits half = whole >> 1;
  // Unsigned, because the bits of a NaN make any e.
  const auto power = [](Bits e) {
    return bit_cast<T>(std::make_unsigned_t<Bits>(e + Constants::kBias) << Constants::kMantissa);
  };
  return {r * series, power(half), power(whole - half)};
}

template <typename T>
TORCHCONV_INLINE T fast_exp(T x) {
  const ExpParts<T> e = exp_parts(x);
  return (e.low + e.low * e.tail) * e.high;
}

template <typename T>
TORCHCONV_INLINE T sigmoid(T x) {
  return T{1} / (T{1} + fast_exp(-x));
}

// tanh(|x|) = -m / (2 + m) with m = exp(-2|x|) - 1, which does not cancel.
template <typename T>
TORCHCONV_INLINE T fast_tanh(T x) {
  const ExpParts<T> e = exp_parts(T{-2} * std::fabs(x));
  const T scale = e.low * e.high;
  const T m = scale * e.tail + (scale - T{1});
  return std::copysign(-m / (T{2} + m), x);
}

// P(X <= x) of the normal distribution. gaussian receives exp(-x^2 / 2).
TORCHCONV_INLINE float normal_cdf(float x, float* gaussian) {
  const float a = std::fabs(x) * 0.70710678f;
  const float t = 1.0f / (1.0f + 0.5f * a);
  const float u = 2.0f * t - 1.0f;
  float q = 4.42884145e-05f;
  q = q * u - 3.67643617e-05f;
  q = q * u - 0.000304719086f;
  q = q * u + 0.000431040022f;
  q = q * u + 0.00153384704f;
  q = q * u - 0.00324373307f;
  q = q * u - 0.0107533109f;
  q = q * u + 0.0182217491f;
  q = q * u + 0.139735946f;
  q = q * u + 0.343580313f;
  q = q * u + 0.510791353f;
  *gaussian = fast_exp(-0.5f * x * x);
  const float tail = 0.5f * t * q * *gaussian;
  return x < 0.0f ? tail : 1.0f - tail;
}
inline double normal_cdf(double x, double* gaussian) {
  *gaussian = fast_exp(-0.5 * x * x);
  return 0.5 * std::erfc(-x * 0.70710678118654752440);
}

}  // namespace torchconv::cpu
