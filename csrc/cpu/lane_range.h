// A run of a vector's lanes as a mask that is made once and used for many moves: the lanes that a
// row of an image has at its ends. No memory outside the run is touched, and what is loaded is zero
// outside it, as are the lanes of a vector that are not kept.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

// N lanes of float or double, of any vector that the instruction set has.
template <typename A, int N>
class LaneRange {
 public:
  using V = Vec<A, N>;
  using Type = typename V::Type;

  LaneRange() = default;
  // Lanes [begin, end) as far as there are such lanes.
  static TORCHCONV_INLINE LaneRange of(int64_t begin, int64_t end) {
    const auto first = static_cast<int>(std::clamp<int64_t>(begin, 0, N));
    return LaneRange(first, static_cast<int>(std::clamp<int64_t>(end, first, N)));
  }

#if defined(TORCHCONV_MASKED_MOVES) && defined(__AVX512VL__)
  TORCHCONV_INLINE Type load(const A* p) const {
    if constexpr (sizeof(Type) == 64 && sizeof(A) == 4)
      return bit_cast<Type>(_mm512_maskz_loadu_ps(mask_, p));
    else if constexpr (sizeof(Type) == 64)
      return bit_cast<Type>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask_), p));
    else if constexpr (sizeof(A) == 4)
      return bit_cast<Type>(_mm256_maskz_loadu_ps(static_cast<__mmask8>(mask_), p));
    else
      return bit_cast<Type>(_mm256_maskz_loadu_pd(static_cast<__mmask8>(mask_), p));
  }
  TORCHCONV_INLINE Type keep(Type v) const {
    if constexpr (sizeof(Type) == 64 && sizeof(A) == 4)
      return bit_cast<Type>(_mm512_maskz_mov_ps(mask_, bit_cast<__m512>(v)));
    else if constexpr (sizeof(Type) == 64)
      return bit_cast<Type>(
          _mm512_maskz_mov_pd(static_cast<__mmask8>(mask_), bit_cast<__m512d>(v)));
    else if constexpr (sizeof(A) == 4)
      return bit_cast<Type>(_mm256_maskz_mov_ps(static_cast<__mmask8>(mask_), bit_cast<__m256>(v)));
    else
      return bit_cast<Type>(
          _mm256_maskz_mov_pd(static_cast<__mmask8>(mask_), bit_cast<__m256d>(v)));
  }
  TORCHCONV_INLINE void store(A* p, Type v) const {
    if constexpr (sizeof(Type) == 64 && sizeof(A) == 4)
      _mm512_mask_storeu_ps(p, mask_, bit_cast<__m512>(v));
    else if constexpr (sizeof(Type) == 64)
      _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask_), bit_cast<__m512d>(v));
    else if constexpr (sizeof(A) == 4)
      _mm256_mask_storeu_ps(p, static_cast<__mmask8>(mask_), bit_cast<__m256>(v));
    else
      _mm256_mask_storeu_pd(p, static_cast<__mmask8>(mask_), bit_cast<__m256d>(v));
  }

 private:
  TORCHCONV_INLINE LaneRange(int first, int last)
      : mask_(static_cast<__mmask16>((uint32_t{1} << last) - (uint32_t{1} << first))) {}
  __mmask16 mask_;
#elif defined(TORCHCONV_MASKED_MOVES)
  using Integer = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
  using I = Vec<Integer, N>;
  TORCHCONV_INLINE Type load(const A* p) const {
    if constexpr (sizeof(A) == 4)
      return bit_cast<Type>(_mm256_maskload_ps(p, bit_cast<__m256i>(mask_)));
    else
      return bit_cast<Type>(_mm256_maskload_pd(p, bit_cast<__m256i>(mask_)));
  }
  TORCHCONV_INLINE Type keep(Type v) const {
    return bit_cast<Type>(bit_cast<typename I::Type>(v) & mask_);
  }
  TORCHCONV_INLINE void store(A* p, Type v) const {
    if constexpr (sizeof(A) == 4)
      _mm256_maskstore_ps(p, bit_cast<__m256i>(mask_), bit_cast<__m256>(v));
    else
      _mm256_maskstore_pd(p, bit_cast<__m256i>(mask_), bit_cast<__m256d>(v));
  }

 private:
  TORCHCONV_INLINE LaneRange(int first, int last)
      : mask_((I::iota() >= I::broadcast(first)) & (I::iota() < I::broadcast(last))) {}
  typename I::Type mask_;
#else
  TORCHCONV_INLINE Type load(const A* p) const {
    if (last_ - first_ == N) return V::load(p);
    A lanes[N] = {};
    for (int l = first_; l < last_; ++l) lanes[l] = p[l];
    return V::load(lanes);
  }
  TORCHCONV_INLINE Type keep(Type v) const {
    for (int l = 0; l < N; ++l)
      if (l < first_ || l >= last_) v[l] = 0;
    return v;
  }
  TORCHCONV_INLINE void store(A* p, Type v) const {
    for (int l = first_; l < last_; ++l) p[l] = v[l];
  }

 private:
  TORCHCONV_INLINE LaneRange(int first, int last) : first_(first), last_(last) {}
  int first_, last_;
#endif
};

}  // namespace torchconv::cpu
