// The columns of bfloat16 with its own rounding instruction.
#include "cpu/microkernels/channel_columns_rounded.h"

#include <cstdlib>

#include "cpu/microkernels/pair_product.h"

#if defined(TORCHCONV_PAIR_PRODUCTS)
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#include "cpu/microkernels/channel_columns_impl.h"

namespace torchconv::cpu {
namespace {

// Widens by one instruction, where a shift would follow the conversion, and rounds by one, which
// takes denormals for zeros.
struct RoundedVec : WideVec<BFloat16> {
  static constexpr bool kAnyKernel = true;
  using Halves = Vec<uint16_t, kLanes>;
  static TORCHCONV_INLINE Type load(const BFloat16* p) {
    // Word 2i + 1 is word i of memory, the others are zero.
    const __m512i from = _mm512_slli_epi32(bit_cast<__m512i>(Vec<int32_t>::iota()), 16);
    const __m512i halves = _mm512_castsi256_si512(bit_cast<__m256i>(Halves::load(p)));
    return bit_cast<Type>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, from, halves));
  }
  static TORCHCONV_INLINE void store(BFloat16* p, const Type (&v)[1], bool) {
    Halves::store(p, bit_cast<Halves::Type>(_mm512_cvtneps_pbh(bit_cast<__m512>(v[0]))));
  }
  static TORCHCONV_INLINE void store(BFloat16* p, const Type (&v)[2], bool) {
    const __m512bh both = _mm512_cvtne2ps_pbh(bit_cast<__m512>(v[1]), bit_cast<__m512>(v[0]));
    Vec<uint16_t>::store(p, bit_cast<Vec<uint16_t>::Type>(both));
  }
};

}  // namespace

void channel_columns_rounded_sum(const ChannelColumns& p, const ChannelColumnsSum<BFloat16>& t) {
  sum_columns<BFloat16, RoundedVec>(p, t);
}

void channel_columns_rounded_spread(const ChannelColumns& p, const ChannelColumnsSum<BFloat16>& t) {
  spread_columns<BFloat16, RoundedVec>(p, t);
}

}  // namespace torchconv::cpu

#pragma GCC pop_options
#else
namespace torchconv::cpu {

void channel_columns_rounded_sum(const ChannelColumns&, const ChannelColumnsSum<BFloat16>&) {
  std::abort();
}
void channel_columns_rounded_spread(const ChannelColumns&, const ChannelColumnsSum<BFloat16>&) {
  std::abort();
}

}  // namespace torchconv::cpu
#endif
