// Dot products of pairs of bfloat16 (avx512_bf16): twice as many multiplications in an instruction
// as float has. A file that multiplies pairs is compiled for the instructions whatever the library
// is compiled for, and called where the processor has them:
//
//   #include "cpu/microkernels/pair_product.h"
//   #if defined(TORCHCONV_PAIR_PRODUCTS)
//   #pragma GCC push_options
//   #pragma GCC target("avx512bf16")
//   the templates and what instantiates them with PairProduct
//   #pragma GCC pop_options
//   #endif
#pragma once

#include <cstdint>

#include "cpu/simd.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    !defined(__clang__) && __GNUC__ >= 10
#define TORCHCONV_PAIR_PRODUCTS
#pragma GCC push_options
#pragma GCC target("avx512bf16")

namespace torchconv::cpu {

// The term of a register tile: two neighbouring channels in the 32 bits of an element.
struct PairProduct {
  using Element = float;
  using Register = Vec<float>::Type;
  static constexpr bool kRounds = true;
  static TORCHCONV_INLINE void add(Register& sum, Register x, Register filters) {
    sum = bit_cast<Register>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(filters),
                                              bit_cast<__m512bh>(x)));
  }
  // x is *p in all lanes. GCC would load it into a register first, which takes the instruction a
  // third of its rate; the sanitizers see that load only.
  static TORCHCONV_INLINE void add_element(Register& sum, const float* p, Register filters) {
#if defined(__SANITIZE_ADDRESS__)
    add(sum, Vec<float>::broadcast(*p), filters);
#else
    Register s = sum;  // else GCC keeps the tile in memory
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(s) : "v"(filters), "m"(*p));
    sum = s;
#endif
  }
  // A row of the tile, here and below; `lanes` of the last vector exist.
  template <int kVectors>
  static TORCHCONV_INLINE void add_row(Register (&row)[kVectors], const BFloat16* p,
                                       int64_t lanes) {
    using V = WideVec<BFloat16>;
    constexpr int64_t kL = V::kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      row[v] += v + 1 < kVectors || lanes == kL ? V::load(p + v * kL)
                                                : V::load_partial(p + v * kL, lanes);
  }
  template <int kVectors>
  static TORCHCONV_INLINE void store(BFloat16* p, const Register (&row)[kVectors], int64_t lanes) {
    constexpr int64_t kL = Vec<float>::kLanes;
    using Halves = Vec<uint16_t, kL>;
    if (kVectors == 2 && lanes == kL) {
      const __m512bh both =
          _mm512_cvtne2ps_pbh(bit_cast<__m512>(row[kVectors - 1]), bit_cast<__m512>(row[0]));
      return Vec<uint16_t>::store(p, bit_cast<Vec<uint16_t>::Type>(both));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto rounded = bit_cast<Halves::Type>(_mm512_cvtneps_pbh(bit_cast<__m512>(row[v])));
      if (v + 1 < kVectors || lanes == kL)
        Halves::store(p + v * kL, rounded);
      else
        Halves::store_partial(p + v * kL, rounded, lanes);
    }
  }
};

}  // namespace torchconv::cpu

#pragma GCC pop_options
#endif
