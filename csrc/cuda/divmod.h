// Division by a number that all threads share, as a multiplication and a shift: a kernel splits a
// flat index into coordinates with two or three of them, and a hardware division takes about twenty
// instructions. Granlund and Montgomery, Division by Invariant Integers using Multiplication
// (1994).
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace torchconv::cuda {

// For dividends below 2^31; a divisor in [1, 2^31).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while (shift_ < 32 && (uint64_t{1} << shift_) < divisor_) ++shift_;
    const uint64_t power = uint64_t{1} << shift_;
    multiplier_ = static_cast<uint32_t>(((power - divisor_) << 32) / divisor_ + 1);
  }

  __host__ __device__ __forceinline__ uint32_t value() const { return divisor_; }

  __host__ __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(n, multiplier_);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{n} * multiplier_) >> 32);
#endif
    return (high + n) >> shift_;
  }

  // n becomes the quotient; the remainder is returned.
  __host__ __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t whole = n;
    n = quotient(n);
    return whole - n * divisor_;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

}  // namespace torchconv::cuda
