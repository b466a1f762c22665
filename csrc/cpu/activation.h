// Activations and the epilogue of a convolution: bias, residual, pre-activation, activation and
// rounding, in one pass over a finished tile; and their derivative, in the pass that also sums the
// bias gradient.
//
// Values and derivatives are PyTorch's, with its conventions at the kinks (relu'(0) = 0, relu6' = 1
// only inside (0, 6)), and NaN stays NaN.
#pragma once

#include <cstdint>
#include <limits>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// to[i] = g(from[i]), which may be the same; A is float or double.
template <typename A>
void activate(Activation activation, const A* from, A* to, int64_t n);
// The same of n elements from each of offsets[m] on, for m < rows.
template <typename A>
void activate_rows(Activation activation, const A* from, A* to, const int64_t* offsets,
                   int64_t rows, int64_t n);

// dst[i] = src[i], rounded.
template <typename T>
TORCHCONV_INLINE void copy_narrow(T* dst, const Wide<T>* src, int64_t n) {
  using V = WideVec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) V::store(dst + i, V::Registers::load(src + i));
  if (i < n) V::store_partial(dst + i, V::Registers::load_partial(src + i, n - i), n - i);
}

// What happens to a finished row of z.
template <typename T>
struct Epilogue {
  T* y;
  T* preactivation;  // null, or where z goes: the same offsets as y
  Activation activation;
  const T* residual = nullptr;  // null, or what z has added: the same offsets as y

  // Whether a kernel has nothing to do but y = g(sums and bias).
  bool activates_only() const { return preactivation == nullptr && residual == nullptr; }
  // Where a kernel of the same type puts z, to read it again for y.
  T* sums() const { return preactivation != nullptr ? preactivation : y; }
  // Whether g clamps to [0, most()], which costs a kernel two instructions, or is nothing.
  bool clamps() const {
    return activation == Activation::kReLU || activation == Activation::kReLU6;
  }
  bool clamps_at_most() const { return clamps() || activation == Activation::kNone; }
  Wide<T> most() const {
    return activation == Activation::kReLU6 ? Wide<T>{6} : std::numeric_limits<Wide<T>>::infinity();
  }

  Epilogue at(int64_t offset) const {
    const auto moved = [&](auto* p) { return p != nullptr ? p + offset : p; };
    return {y + offset, moved(preactivation), activation, moved(residual)};
  }

  // z (scratch, overwritten) has had its bias; element i goes to offset + i*stride.
  void store(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const;
  // The same of a few neighbours: what has only to be rounded needs no call.
  TORCHCONV_INLINE void store_few(Wide<T>* z, int64_t n, int64_t offset) const {
    if (activates_only() && activation == Activation::kNone) return copy_narrow(y + offset, z, n);
    store(z, n, offset, 1);
  }

 private:
  void add_and_store(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const;
  void store_sums(Wide<T>* z, int64_t n, int64_t offset, int64_t stride) const;
};

// dz = dy * g'(saved) and db = dz summed over all but channels. saved is y, or the pre-activation
// where derivative_needs_preactivation, or null with kNone. dz and db may be null; with kNone dz
// must be. db is summed in blocks fixed by the shape. dy may be a part of an image
// (pixel_channels).
template <typename T>
void activation_backward(const ConvProblem& p, const T* dy, const T* saved, T* dz, T* db,
                         const Parallel& pool);

}  // namespace torchconv::cpu
