// What only pooling needs of vectors, beyond simd.h: a maximum that propagates NaN as PyTorch's
// does, every second element of a row, and two phases of a row merged into one.
// LaneInt is what a lane counts with: selections are carried in integers as wide as the values.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/simd.h"

namespace torchconv::cpu {

template <int... I, typename V>
TORCHCONV_INLINE V even_lanes(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(2 * I)...>(a, b);
}
template <int... I, typename V>
TORCHCONV_INLINE V odd_lanes(V a, V b, std::integer_sequence<int, I...>) {
  return shuffle<(2 * I + 1)...>(a, b);
}
template <int kFirst, int... I, typename V>
TORCHCONV_INLINE V merge_lanes(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  return shuffle<(kFirst + I / 2 + (I % 2) * kLanes)...>(a, b);
}

template <int n, int... I, typename V>
TORCHCONV_INLINE V rotate_lanes(V a, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I);
  return shuffle<((I + n) % kLanes)...>(a, a);
}
// Lane i of the result is lane i + n, modulo their number.
template <typename Lane, int n, typename V>
TORCHCONV_INLINE V rotate_lanes(V a) {
  return rotate_lanes<n>(a, std::make_integer_sequence<int, Vec<Lane>::kLanes>());
}

// The lower or upper halves of every block of kBlock lanes, of a and b in turns.
template <int kBlock, bool kUpper, int... I, typename V>
TORCHCONV_INLINE V block_halves(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int kLanes = sizeof...(I), kHalf = kBlock / 2;
  return shuffle<(I / kBlock * kBlock + I % kHalf + (kUpper ? kHalf : 0) +
                  I % kBlock / kHalf * kLanes)...>(a, b);
}
// Folds as many vectors as they have lanes: lane i of the result is all lanes of v[i].
template <typename Lane, int kBlock = Vec<Lane>::kLanes, typename V, typename Fold>
TORCHCONV_INLINE V fold_each(V* v, Fold fold) {
  constexpr auto kIndices = std::make_integer_sequence<int, Vec<Lane>::kLanes>();
#pragma GCC unroll 8
  for (int i = 0; i < kBlock / 2; i++) {
    const V a = v[i], b = v[i + kBlock / 2];
    v[i] = fold(block_halves<kBlock, false>(a, b, kIndices),
                block_halves<kBlock, true>(a, b, kIndices));
  }
  if constexpr (kBlock > 2) {
    return fold_each<Lane, kBlock / 2>(v, fold);
  } else {
    return v[0];
  }
}

// a[0], b[0], a[1], b[1], ...: two registers.
template <typename Lane, typename V>
TORCHCONV_INLINE void interleave(V a, V b, V* low, V* high) {
  constexpr int kLanes = Vec<Lane>::kLanes;
  *low = merge_lanes<0>(a, b, std::make_integer_sequence<int, kLanes>());
  *high = merge_lanes<kLanes / 2>(a, b, std::make_integer_sequence<int, kLanes>());
}

// The greater lane by lane, or NaN where either is NaN.
template <typename V>
TORCHCONV_INLINE V maximum(V a, V b) {
  return ((a > b) | (a != a)) ? a : b;
}
#if defined(__AVX512F__)
// The hardware's maximum gives b where either lane is NaN; what is left to repair is a NaN in a.
// The table says: where a is a quiet (0) or signalling (1) NaN take it (2: as quiet), else keep
// (0).
TORCHCONV_INLINE Vec<float>::Type maximum(Vec<float>::Type a, Vec<float>::Type b) {
  const __m512 m = _mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b));
  return bit_cast<Vec<float>::Type>(
      _mm512_fixupimm_ps(m, bit_cast<__m512>(a), _mm512_set1_epi32(0x22), 0));
}
TORCHCONV_INLINE Vec<double>::Type maximum(Vec<double>::Type a, Vec<double>::Type b) {
  const __m512d m = _mm512_maskz_max_pd(0xff, bit_cast<__m512d>(a), bit_cast<__m512d>(b));
  return bit_cast<Vec<double>::Type>(
      _mm512_fixupimm_pd(m, bit_cast<__m512d>(a), _mm512_set1_epi64(0x22), 0));
}
#elif defined(__AVX2__)
// Likewise: where a is NaN take it.
TORCHCONV_INLINE Vec<float>::Type maximum(Vec<float>::Type a, Vec<float>::Type b) {
  const __m256 x = bit_cast<__m256>(a), m = _mm256_max_ps(x, bit_cast<__m256>(b));
  return bit_cast<Vec<float>::Type>(_mm256_blendv_ps(m, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
TORCHCONV_INLINE Vec<double>::Type maximum(Vec<double>::Type a, Vec<double>::Type b) {
  const __m256d x = bit_cast<__m256d>(a), m = _mm256_max_pd(x, bit_cast<__m256d>(b));
  return bit_cast<Vec<double>::Type>(_mm256_blendv_pd(m, x, _mm256_cmp_pd(x, x, _CMP_UNORD_Q)));
}
#endif

// The candidate and its code, in the lanes where it is greater or NaN.
template <typename V, typename C>
TORCHCONV_INLINE void take_greater(V* best, C* code, V candidate, C candidate_code) {
  const auto better = (candidate > *best) | (candidate != candidate);
  *best = better ? candidate : *best;
  *code = better ? candidate_code : *code;
}
#if defined(__AVX512F__)
// Where it is neither, by one mask in the other: two masks joined by "or" cost an instruction more.
TORCHCONV_INLINE void take_greater(Vec<float>::Type* best, Vec<int32_t>::Type* code,
                                   Vec<float>::Type candidate, Vec<int32_t>::Type candidate_code) {
  const __m512 a = bit_cast<__m512>(candidate), b = bit_cast<__m512>(*best);
  const __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
  const __mmask16 keep = _mm512_mask_cmp_ps_mask(number, a, b, _CMP_NGT_UQ);
  *best = bit_cast<Vec<float>::Type>(_mm512_mask_blend_ps(keep, a, b));
  *code = bit_cast<Vec<int32_t>::Type>(
      _mm512_mask_blend_epi32(keep, bit_cast<__m512i>(candidate_code), bit_cast<__m512i>(*code)));
}
TORCHCONV_INLINE void take_greater(Vec<double>::Type* best, Vec<int64_t>::Type* code,
                                   Vec<double>::Type candidate, Vec<int64_t>::Type candidate_code) {
  const __m512d a = bit_cast<__m512d>(candidate), b = bit_cast<__m512d>(*best);
  const __mmask8 number = _mm512_cmp_pd_mask(a, a, _CMP_ORD_Q);
  const __mmask8 keep = _mm512_mask_cmp_pd_mask(number, a, b, _CMP_NGT_UQ);
  *best = bit_cast<Vec<double>::Type>(_mm512_mask_blend_pd(keep, a, b));
  *code = bit_cast<Vec<int64_t>::Type>(
      _mm512_mask_blend_epi64(keep, bit_cast<__m512i>(candidate_code), bit_cast<__m512i>(*code)));
}
#endif

// The candidate, its row and its column in the lanes where it is greater, or equal and of an
// earlier row, or NaN and the last of several. Candidates come column by column.
template <typename V, typename C>
TORCHCONV_INLINE void take_greater(V* best, C* row, C* column, V candidate, C candidate_row,
                                   C candidate_column) {
  const auto earlier = (candidate == *best) & (candidate_row < *row);
  const auto last = (candidate != candidate) & ((*best == *best) | (candidate_row >= *row));
  const auto better = (candidate > *best) | earlier | last;
  *best = better ? candidate : *best;
  *row = better ? candidate_row : *row;
  *column = better ? candidate_column : *column;
}

// sum + v in the lanes where a and b are equal.
template <typename Lane, typename Held, typename V, typename H>
TORCHCONV_INLINE V add_where_equal(V sum, H a, H b, V v) {
  constexpr int kLanes = Vec<Lane>::kLanes;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (kLanes == 16 && sizeof(Held) == 1) {
    const __mmask16 equal = _mm_cmpeq_epi8_mask(bit_cast<__m128i>(a), bit_cast<__m128i>(b));
    return bit_cast<V>(_mm512_mask_add_ps(bit_cast<__m512>(sum), equal, bit_cast<__m512>(sum),
                                          bit_cast<__m512>(v)));
  } else if constexpr (kLanes == 16 && sizeof(Held) == 4) {
    const __mmask16 equal = _mm512_cmpeq_epi32_mask(bit_cast<__m512i>(a), bit_cast<__m512i>(b));
    return bit_cast<V>(_mm512_mask_add_ps(bit_cast<__m512>(sum), equal, bit_cast<__m512>(sum),
                                          bit_cast<__m512>(v)));
  } else
#endif
  {
    using Mask = std::conditional_t<sizeof(Lane) == 8, int64_t, int32_t>;
    return sum + (convert<Mask, std::make_signed_t<Held>, kLanes>(a == b) ? v : V{});
  }
}

// Integers as those of another width, modulo 2^bits.
template <typename To, typename From>
void convert_run(const From* from, int64_t n, To* to) {
  constexpr int kLanes = Vec<From>::kLanes;
  using Source = Vec<From>;
  using Target = Vec<To, kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    Target::store(to + i, convert<To, From, kLanes>(Source::load(from + i)));
  if (i < n)
    Target::store_partial(to + i, convert<To, From, kLanes>(Source::load_partial(from + i, n - i)),
                          n - i);
}

// Lanes p[i * kStride] as Wide<T>. kStride, 1 or 2, also reads p[kStride * kLanes - 1].
template <typename T, int kStride>
TORCHCONV_INLINE typename WideVec<T>::Type load_strided(const T* p) {
  using W = WideVec<T>;
  constexpr int kLanes = W::kLanes;
  if constexpr (kStride == 1) {
    return W::load(p);
  } else if constexpr (sizeof(T) == sizeof(Wide<T>)) {
    return even_lanes(W::load(p), W::load(p + kLanes), std::make_integer_sequence<int, kLanes>());
  } else {
    // Two elements a lane; dropping the upper one leaves every second.
    const auto pairs = Vec<uint32_t, kLanes>::load(p);
    if constexpr (std::is_same_v<T, BFloat16>) {
      return float_from_bfloat16<typename W::Type>(pairs);
    } else {
      T even[kLanes];
      Vec<uint16_t, kLanes>::store(even, convert<uint16_t, uint32_t, kLanes>(pairs));
      return W::load(even);
    }
  }
}

// Lanes p[i * kStride + s] for s < kTaps, 2 or 3, of strides 1 and 2: a window's taps along a row.
// Also reads up to p[kStride * kLanes + kTaps - 2].
template <typename T, int kStride, int kTaps>
TORCHCONV_INLINE void load_taps(const T* p, typename WideVec<T>::Type* taps) {
  using W = WideVec<T>;
  using V = typename W::Type;
  constexpr int kLanes = W::kLanes;
  if constexpr (kStride == 1) {
#pragma GCC unroll 3
    for (int s = 0; s < kTaps; s++) taps[s] = W::load(p + s);
    return;
  } else if constexpr (sizeof(T) == sizeof(Wide<T>)) {
    constexpr auto kIndices = std::make_integer_sequence<int, kLanes>();
    const V a = W::load(p), b = W::load(p + kLanes);
    taps[0] = even_lanes(a, b, kIndices);
    taps[1] = odd_lanes(a, b, kIndices);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const auto pairs = Vec<uint32_t, kLanes>::load(p);
    taps[0] = float_from_bfloat16<V>(pairs);
    taps[1] = bit_cast<V>(pairs & 0xffff0000u);
  } else {
    taps[0] = load_strided<T, 2>(p);
    taps[1] = load_strided<T, 2>(p + 1);
  }
  if constexpr (kTaps == 3) taps[2] = load_strided<T, 2>(p + 2);
}

// What a lane of T's computation counts with: an integer as wide as the lane.
template <typename T>
using LaneInt = std::conditional_t<sizeof(Wide<T>) == 8, int64_t, int32_t>;

}  // namespace torchconv::cpu
