// What the kernels of plane_rows.h share: the source vectors that one row gives a strip, and the
// sum of a vector.
#pragma once

#include "cpu/conv_pack.h"
#include "cpu/lane_range.h"
#include "cpu/microkernels/plane_rows.h"
#include "cpu/unroll.h"

namespace torchconv::cpu {

// Planes narrower than half a vector of the widest registers take half vectors, of which the
// machine does as much work at a time with fewer lanes idle.
template <typename A>
inline constexpr int kNarrowLanes = kVectorBytes == 64 && sizeof(A) == 4 ? 8 : kLanes<A>;

#if defined(__AVX512F__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

// Has an address computed here: GCC would else compute all those of a loop's body ahead of it and,
// where there are more than registers, keep them in memory.
template <typename A>
TORCHCONV_INLINE void keep_address(const A*& p) {
  __asm__("" : "+r"(p));
}

template <int kFirst, typename Type, int... I>
TORCHCONV_INLINE Type shuffled_consecutive_lanes(Type a, Type b, std::integer_sequence<int, I...>) {
  return shuffle<(kFirst + I)...>(a, b);
}

// Lanes kFirst, kFirst + 1, ... of a followed by b.
template <typename A, int N, int kFirst, typename Type = typename Vec<A, N>::Type>
TORCHCONV_INLINE Type consecutive_lanes(Type a, Type b) {
#if defined(__AVX512VL__)  // with the index in the instruction, which GCC does not find
  if constexpr (sizeof(Type) == 64 && sizeof(A) == 4)
    return bit_cast<Type>(
        _mm512_maskz_alignr_epi32(0xffff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), kFirst));
  if constexpr (sizeof(Type) == 64 && sizeof(A) == 8)
    return bit_cast<Type>(
        _mm512_maskz_alignr_epi64(0xff, bit_cast<__m512i>(b), bit_cast<__m512i>(a), kFirst));
  if constexpr (sizeof(Type) == 32 && sizeof(A) == 4)
    return bit_cast<Type>(_mm256_alignr_epi32(bit_cast<__m256i>(b), bit_cast<__m256i>(a), kFirst));
#endif
  return shuffled_consecutive_lanes<kFirst>(a, b, std::make_integer_sequence<int, N>());
}

template <typename A, int N>
TORCHCONV_INLINE A add_lanes(typename Vec<A, N>::Type v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    typename Vec<A, N / 2>::Type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return add_lanes<A, N / 2>(halves[0] + halves[1]);
  }
}

// Columns s of the kernel for the N output columns from `first` on. With a step of 2 the row's even
// and odd columns are parted in registers once, about the kernel's middle column; the columns
// further out are these moved by a lane, or by one twice.
template <typename A, int N, int R, int kStep>
class StripSource {
 public:
  using Lanes = LaneRange<A, N>;
  using V = Vec<A, N>;
  using Type = typename V::Type;
  static_assert(R <= 7, "a column further out would be three lanes away");

  StripSource() = default;
  TORCHCONV_INLINE StripSource(const PlaneRows& p, int64_t first)
      : offset_(first * kStep), gap_(kStep == 1 ? p.dilation : 1) {
    unroll<kLoads>([&](auto s) TORCHCONV_INLINE_LAMBDA {
      const int64_t column = offset_ + (kStep == 1 ? s * gap_ : R / 2 + s * N);
      lanes_[s] = Lanes::of(p.left - column, p.right - column);
    });
    if constexpr (kStep == 2)
      unroll<R>([&](auto s) TORCHCONV_INLINE_LAMBDA {
        const int64_t column = offset_ + edge(s);
        inside_[s] = column >= p.left && column < p.right;
      });
  }

  struct Row {
    const A* first;
    Type part[2];
  };
  TORCHCONV_INLINE Row row(const A* p) const {
    Row row{p + offset_, {}};
    if constexpr (kStep == 2) {
      constexpr auto kIndex = std::make_integer_sequence<int, N>();
      const A* middle = row.first + R / 2;
      const Type a = lanes_[0].load(middle), b = lanes_[1].load(middle + N);
      row.part[0] = alternate_lanes<0>(a, b, kIndex);
      row.part[1] = alternate_lanes<1>(a, b, kIndex);
    }
    return row;
  }
  // Asks for what the row at p will load.
  TORCHCONV_INLINE void fetch(const A* p) const {
    unroll<kStep>([&](auto k)
                      TORCHCONV_INLINE_LAMBDA { __builtin_prefetch(p + offset_ + k * N, 0, 2); });
  }
  template <int s>
  TORCHCONV_INLINE Type column(const Row& row) const {
    if constexpr (kStep == 1) {
      return lanes_[s].load(row.first + s * gap_);
    } else {
      const Type part = row.part[(s + R / 2) % 2];
      if constexpr (move(s) == 0) return part;
      const Type outside = V::broadcast(inside_[s] ? row.first[edge(s)] : A{0});
      if constexpr (move(s) < -1)
        return consecutive_lanes<A, N, N - 1>(outside, column<s + 2>(row));
      return move(s) < 0 ? consecutive_lanes<A, N, N - 1>(outside, part)
                         : consecutive_lanes<A, N, 1>(part, outside);
    }
  }

 private:
  static constexpr int kLoads = kStep == 1 ? R : 2;
  // Lanes that column s is moved by, and the source column that this brings in.
  static constexpr int move(int s) { return (s - R / 2 + 4) / 2 - 2; }
  static constexpr int edge(int s) { return move(s) < 0 ? s : s + 2 * (N - 1); }

  Lanes lanes_[kLoads];
  bool inside_[R];
  int64_t offset_, gap_;
};

}  // namespace torchconv::cpu
