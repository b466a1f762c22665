// The vocabulary that every layer shares: element types, memory layouts and activations.
#pragma once

#include <cstdint>

namespace torchconv {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kBFloat16,
  kFloat16,
  kUInt8,  // also bool, whose maximum and minimum are those of its bytes
  kInt8,
  kInt16,
  kInt32,
  kInt64,
  kUInt16,
};

// Where the channel index stands in memory. For a weight kNCHW means K x C x R x S and kNHWC means
// K x R x S x C, as PyTorch's contiguous and channels_last formats do.
enum class Layout : uint8_t { kNCHW, kNHWC };

enum class Activation : uint8_t {
  kNone,
  kReLU,
  kReLU6,
  kSigmoid,
  kTanh,
  kSiLU,
  kHardswish,
  kGELU,  // the exact form, x * Phi(x)
};

// True where the derivative cannot be had from the output and needs the pre-activation.
constexpr bool derivative_needs_preactivation(Activation a) {
  return a == Activation::kSiLU || a == Activation::kHardswish || a == Activation::kGELU;
}

}  // namespace torchconv
