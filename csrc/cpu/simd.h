// Vectors as wide as the instruction set: 64, 32 or 16 bytes, from one kernel source.
//
// Vec<T> holds T in registers and in memory. WideVec<T> computes in Wide<T> what memory holds as T:
// bfloat16 and float16 become float, the small integers int32_t. Arithmetic is the compiler's
// operators on the vector types; only what they cannot express well is written with intrinsics.
// bfloat16 and float16 round to nearest even; without F16C float16 is converted by integer
// operations that are exact for every value (F. Giesen, "float->half variants", 2012).
// GCC keeps a register-tile array in registers only if every loop over it is fully unrolled.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

// Every function of wide vectors is inlined, so how they would be passed is of no interest.
#pragma GCC diagnostic ignored "-Wpsabi"
#define TORCHCONV_INLINE inline __attribute__((always_inline))

// AddressSanitizer does not see what a masked move touches: under it (make sanitize) the portable
// branches, which touch the same memory, take their place.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
#define TORCHCONV_MASKED_MOVES
#endif

namespace torchconv::cpu {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
TORCHCONV_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// GCC drops the attribute of a dependent type that is named in the template that declares it.
template <typename T, int N>
struct VectorType {
  typedef T Type __attribute__((vector_size(N * sizeof(T))));
};

// N lanes of T. BFloat16 and Float16 are plain bits here: see WideVec for their values.
template <typename T, int N = kVectorBytes / static_cast<int>(sizeof(T))>
struct Vec {
  static constexpr int kLanes = N;
  using Type = typename VectorType<T, N>::Type;

  static TORCHCONV_INLINE Type load(const void* p) {
    Type v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static TORCHCONV_INLINE void store(void* p, Type v) { std::memcpy(p, &v, sizeof(v)); }
  static TORCHCONV_INLINE Type broadcast(T x) {
    return broadcast(x, std::make_integer_sequence<int, N>());
  }
  // 0, 1, 2, ...
  static TORCHCONV_INLINE Type iota() { return iota(std::make_integer_sequence<int, N>()); }
  // The first n lanes, 0 <= n <= N; a load sets the others to 0 and neither touches their memory.
  static TORCHCONV_INLINE Type load_partial(const void* p, int64_t n);
  static TORCHCONV_INLINE void store_partial(void* p, Type v, int64_t n);

 private:
  template <int... I>
  static TORCHCONV_INLINE Type broadcast(T x, std::integer_sequence<int, I...>) {
    return Type{(static_cast<void>(I), x)...};
  }
  template <int... I>
  static TORCHCONV_INLINE Type iota(std::integer_sequence<int, I...>) {
    return Type{static_cast<T>(I)...};
  }
};

// Lane i of the result is lane I[i] of a followed by b.
template <int... I, typename V>
TORCHCONV_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  using Lane = std::decay_t<decltype(a[0])>;
  using Index = std::conditional_t<sizeof(Lane) == 8, int64_t,
                                   std::conditional_t<sizeof(Lane) == 4, int32_t, int16_t> >;
  return __builtin_shuffle(a, b, (typename Vec<Index, sizeof...(I)>::Type){I...});
#endif
}

// Lane i of the result is lane lanes[i] of v, for lanes known only at run time.
template <typename V, typename Lanes>
TORCHCONV_INLINE V permute(V v, Lanes lanes) {
#if defined(__clang__)
  return __builtin_shufflevector(v, lanes);
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// Whether one instruction does that for vectors of A: float or double.
#if defined(__AVX512F__)
template <typename A>
inline constexpr bool kPermutesLanes = true;
#elif defined(__AVX2__)
template <typename A>
inline constexpr bool kPermutesLanes = sizeof(A) == 4;
#else
template <typename A>
inline constexpr bool kPermutesLanes = false;
#endif

template <typename A>
using LaneIndex = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// Vec::load_partial and store_partial for a vector type V of T.
#if defined(TORCHCONV_MASKED_MOVES) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <typename V, typename T>
struct PartialMemory {
  // By the element for 4 and 8 bytes, by the byte for 1 and 2.
  static constexpr int kUnit = sizeof(T) < 4 ? 1 : static_cast<int>(sizeof(T));
  static TORCHCONV_INLINE uint64_t mask(int64_t n) {
    const int64_t units = n * static_cast<int64_t>(sizeof(T)) / kUnit;
    return units >= 64 ? ~uint64_t{0} : (uint64_t{1} << units) - 1;
  }

  static TORCHCONV_INLINE V load(const void* p, int64_t n) {
    const uint64_t m = mask(n);
    if constexpr (sizeof(V) == 64) {
      if constexpr (kUnit == 1) return bit_cast<V>(_mm512_maskz_loadu_epi8(m, p));
      if constexpr (kUnit == 4) return bit_cast<V>(_mm512_maskz_loadu_epi32(m, p));
      if constexpr (kUnit == 8) return bit_cast<V>(_mm512_maskz_loadu_epi64(m, p));
    } else if constexpr (sizeof(V) == 32) {
      if constexpr (kUnit == 1) return bit_cast<V>(_mm256_maskz_loadu_epi8(m, p));
      if constexpr (kUnit == 4) return bit_cast<V>(_mm256_maskz_loadu_epi32(m, p));
      if constexpr (kUnit == 8) return bit_cast<V>(_mm256_maskz_loadu_epi64(m, p));
    } else if constexpr (sizeof(V) == 16) {
      if constexpr (kUnit == 1) return bit_cast<V>(_mm_maskz_loadu_epi8(m, p));
      if constexpr (kUnit == 4) return bit_cast<V>(_mm_maskz_loadu_epi32(m, p));
      if constexpr (kUnit == 8) return bit_cast<V>(_mm_maskz_loadu_epi64(m, p));
    } else {
      V v{};
      std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
      return v;
    }
  }

  static TORCHCONV_INLINE void store(void* p, V v, int64_t n) {
    const uint64_t m = mask(n);
    if constexpr (sizeof(V) == 64) {
      if constexpr (kUnit == 1) _mm512_mask_storeu_epi8(p, m, bit_cast<__m512i>(v));
      if constexpr (kUnit == 4) _mm512_mask_storeu_epi32(p, m, bit_cast<__m512i>(v));
      if constexpr (kUnit == 8) _mm512_mask_storeu_epi64(p, m, bit_cast<__m512i>(v));
    } else if constexpr (sizeof(V) == 32) {
      if constexpr (kUnit == 1) _mm256_mask_storeu_epi8(p, m, bit_cast<__m256i>(v));
      if constexpr (kUnit == 4) _mm256_mask_storeu_epi32(p, m, bit_cast<__m256i>(v));
      if constexpr (kUnit == 8) _mm256_mask_storeu_epi64(p, m, bit_cast<__m256i>(v));
    } else if constexpr (sizeof(V) == 16) {
      if constexpr (kUnit == 1) _mm_mask_storeu_epi8(p, m, bit_cast<__m128i>(v));
      if constexpr (kUnit == 4) _mm_mask_storeu_epi32(p, m, bit_cast<__m128i>(v));
      if constexpr (kUnit == 8) _mm_mask_storeu_epi64(p, m, bit_cast<__m128i>(v));
    } else {
      std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
    }
  }
};
#else
template <typename V, typename T>
struct PartialMemory {
#if defined(TORCHCONV_MASKED_MOVES)
  static constexpr bool kMaskedMove = sizeof(V) == 32 && sizeof(T) >= 4;
  static TORCHCONV_INLINE __m256i mask(int64_t n) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const int words = static_cast<int>(n * static_cast<int64_t>(sizeof(T) / 4));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(words), lanes);
  }
#else
  static constexpr bool kMaskedMove = false;
#endif

  static TORCHCONV_INLINE V load(const void* p, int64_t n) {
#if defined(TORCHCONV_MASKED_MOVES)
    if constexpr (kMaskedMove)
      return bit_cast<V>(_mm256_maskload_epi32(static_cast<const int*>(p), mask(n)));
#endif
    V v{};
    std::memcpy(&v, p, static_cast<size_t>(n) * sizeof(T));
    return v;
  }

  static TORCHCONV_INLINE void store(void* p, V v, int64_t n) {
#if defined(TORCHCONV_MASKED_MOVES)
    if constexpr (kMaskedMove)
      return _mm256_maskstore_epi32(static_cast<int*>(p), mask(n), bit_cast<__m256i>(v));
#endif
    std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(T));
  }
};
#endif

template <typename T, int N>
TORCHCONV_INLINE typename Vec<T, N>::Type Vec<T, N>::load_partial(const void* p, int64_t n) {
  return PartialMemory<Type, T>::load(p, n);
}
template <typename T, int N>
TORCHCONV_INLINE void Vec<T, N>::store_partial(void* p, Type v, int64_t n) {
  PartialMemory<Type, T>::store(p, v, n);
}

// Converts lane by lane, integers modulo 2^bits. GCC 12 splits the ones written out here.
template <typename To, typename From, int N>
TORCHCONV_INLINE typename Vec<To, N>::Type convert(typename Vec<From, N>::Type v) {
  using Result = typename Vec<To, N>::Type;
  [[maybe_unused]] constexpr bool kToWord = std::is_integral_v<To> && sizeof(To) == 4;
  [[maybe_unused]] constexpr bool kFromWord = std::is_integral_v<From> && sizeof(From) == 4;
  if constexpr (std::is_same_v<To, From>) return v;
#if defined(__AVX512F__)
  if constexpr (N == 16 && kToWord && std::is_same_v<From, uint8_t>)
    return bit_cast<Result>(_mm512_maskz_cvtepu8_epi32(0xffff, bit_cast<__m128i>(v)));
  else if constexpr (N == 16 && kToWord && std::is_same_v<From, uint16_t>)
    return bit_cast<Result>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
  else if constexpr (N == 16 && kFromWord && std::is_integral_v<To> && sizeof(To) == 1)
    return bit_cast<Result>(_mm512_maskz_cvtepi32_epi8(0xffff, bit_cast<__m512i>(v)));
  else if constexpr (N == 16 && kFromWord && std::is_integral_v<To> && sizeof(To) == 2)
    return bit_cast<Result>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v)));
  else if constexpr (N == 8 && std::is_same_v<To, double> && std::is_same_v<From, float>)
    return bit_cast<Result>(_mm512_maskz_cvtps_pd(0xff, bit_cast<__m256>(v)));
  else
#elif defined(__AVX2__)
  if constexpr (N == 8 && kToWord && std::is_same_v<From, uint8_t>)
    return bit_cast<Result>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(v))));
  else if constexpr (N == 8 && kToWord && std::is_same_v<From, uint16_t>)
    return bit_cast<Result>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
  else
#endif
    return __builtin_convertvector(v, Result);
}

// ---- bfloat16 and float16, alike for one value (U = uint32_t, F = float) and for a vector of
// them.

template <typename F, typename U>
TORCHCONV_INLINE F float_from_bfloat16(U bits) {
  return bit_cast<F>(bits << 16);
}

template <typename U, typename F>
TORCHCONV_INLINE U bfloat16_from_float(F x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + (((bits >> 16) & 1u) + 0x7fffu)) >> 16;
  return x != x ? U{} + 0x7fc0u : rounded;
}

template <typename F, typename U>
TORCHCONV_INLINE F float_from_float16_exact(U h) {
  const U magnitude = (h & 0x7fffu) << 13;
  const U exponent = magnitude & 0x0f800000u;
  const U normal = magnitude + 0x38000000u;  // exponent bias 15 to 127
  const U special = normal + 0x38000000u;    // infinity and NaN
  const U hidden = U{} + 0x38800000u;        // 2^-14
  const F denormal = bit_cast<F>(magnitude + hidden) - bit_cast<F>(hidden);
  U bits = exponent == 0x0f800000u ? special : normal;
  bits = exponent == 0u ? bit_cast<U>(denormal) : bits;
  return bit_cast<F>(bits | ((h & 0x8000u) << 16));
}

template <typename U, typename F>
TORCHCONV_INLINE U float16_from_float_exact(F x) {
  const U bits = bit_cast<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  const U nan = U{} + 0x7e00u;
  const U infinity = U{} + 0x7c00u;
  const U special = magnitude > 0x7f800000u ? nan : infinity;
  // Adding 0.5 lets the float adder round to the spacing of float16's denormals, 2^-24.
  const U half = U{} + 0x3f000000u;
  const U denormal = bit_cast<U>(bit_cast<F>(magnitude) + bit_cast<F>(half)) - half;
  const U normal = (magnitude - 0x38000000u + (((magnitude >> 13) & 1u) + 0xfffu)) >> 13;
  U h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x47800000u ? special : h;
  return h | ((bits & 0x80000000u) >> 16);
}

// ---- Wide<T>: what T is computed in.

template <typename T>
struct WideOf {
  using Type = std::conditional_t<std::is_integral_v<T> && sizeof(T) < 4, int32_t, T>;
};
template <>
struct WideOf<BFloat16> {
  using Type = float;
};
template <>
struct WideOf<Float16> {
  using Type = float;
};
template <typename T>
using Wide = typename WideOf<T>::Type;

template <typename T>
TORCHCONV_INLINE Wide<T> to_wide(T x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return float_from_bfloat16<float>(uint32_t{x.bits});
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#else
    return float_from_float16_exact<float>(uint32_t{x.bits});
#endif
  } else {
    return x;
  }
}

template <typename T>
TORCHCONV_INLINE T from_wide(Wide<T> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(bfloat16_from_float<uint32_t>(x))};
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    return {static_cast<uint16_t>(float16_from_float_exact<uint32_t>(x))};
#endif
  } else {
    return static_cast<T>(x);
  }
}

// Keeps a loaded value in its register: GCC would else fold the load into each of its uses.
template <typename V>
TORCHCONV_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(__SSE2__)
  __asm__("" : "+v"(v));
#endif
}

// Lanes of floating point within [0, most]; NaN stays. Of a zero that the compiler knows it makes a
// comparison and a move, where this is one instruction.
template <typename V>
TORCHCONV_INLINE V clamped(V v, V most) {
  V zero{};
  keep_in_register(zero);
  v = zero > v ? zero : v;
  return most < v ? most : v;
}

// An array of at least this many bytes is worth streaming past the caches: its stores then need not
// read what they overwrite, and whoever reads it next would find little of it in a last cache of
// 32 MB, what the cores that share one commonly have.
inline constexpr int64_t kStreamedBytes = 16 << 20;

template <typename V>
TORCHCONV_INLINE void stream_bytes(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64)
    return _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32)
    return _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16)
    return _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
#endif
  std::memcpy(p, &v, sizeof(v));
}

// Vectors of Wide<T>, a full register each, that memory holds as T.
template <typename T>
struct WideVec {
  using Lane = Wide<T>;
  using Registers = Vec<Lane>;
  using Type = typename Registers::Type;
  static constexpr int kLanes = Registers::kLanes;

  static TORCHCONV_INLINE Type load(const T* p) { return widen(Memory::load(p)); }
  static TORCHCONV_INLINE Type load_partial(const T* p, int64_t n) {
    return widen(Memory::load_partial(p, n));
  }
  static TORCHCONV_INLINE void store(T* p, Type v) { Memory::store(p, narrow(v)); }
  static TORCHCONV_INLINE void store_partial(T* p, Type v, int64_t n) {
    Memory::store_partial(p, narrow(v), n);
  }
  // Past the caches where `streams`: then p streamable, and stream_fence() after a thread's last.
  static TORCHCONV_INLINE void store(T* p, Type v, bool streams) {
    if (streams) {
      stream_bytes(p, narrow(v));
    } else {
      Memory::store(p, narrow(v));
    }
  }
  static bool streamable(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
  }
  // Whether to stream an array of rows.
  static bool streams(const T* p, int64_t elements, int64_t row) {
    return elements >= kStreamedBytes / static_cast<int64_t>(sizeof(T)) && streamable(p) &&
           row % kLanes == 0;
  }
  static TORCHCONV_INLINE Type broadcast(Lane x) { return Registers::broadcast(x); }

 private:
  static constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  static constexpr bool kFloat16 = std::is_same_v<T, Float16>;
  using Stored = std::conditional_t<kBFloat16 || kFloat16, uint16_t, T>;
  using Memory = Vec<Stored, kLanes>;
  using Bits = typename Vec<uint32_t, kLanes>::Type;
  using Raw = typename Memory::Type;

  static TORCHCONV_INLINE Type widen(Raw raw) {
    if constexpr (kBFloat16) {
      return float_from_bfloat16<Type>(convert<uint32_t, Stored, kLanes>(raw));
    } else if constexpr (kFloat16) {
#if defined(__AVX512F__)
      return bit_cast<Type>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(raw)));
#elif defined(__AVX2__) && defined(__F16C__)
      return bit_cast<Type>(_mm256_cvtph_ps(bit_cast<__m128i>(raw)));
#else
      return float_from_float16_exact<Type>(convert<uint32_t, Stored, kLanes>(raw));
#endif
    } else if constexpr (std::is_same_v<T, Lane>) {
      return raw;
    } else {
      return convert<Lane, Stored, kLanes>(raw);
    }
  }

  static TORCHCONV_INLINE Raw narrow(Type v) {
    if constexpr (kBFloat16) {
      return convert<Stored, uint32_t, kLanes>(bfloat16_from_float<Bits>(v));
    } else if constexpr (kFloat16) {
#if defined(__AVX512F__)
      return bit_cast<Raw>(
          _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
      return bit_cast<Raw>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
      return convert<Stored, uint32_t, kLanes>(float16_from_float_exact<Bits>(v));
#endif
    } else if constexpr (std::is_same_v<T, Lane>) {
      return v;
    } else {
      return convert<Stored, Lane, kLanes>(v);
    }
  }
};

// Makes streamed stores visible to other threads.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace torchconv::cpu
