// Vectors of batch normalisation: elements in the type they are computed in, constants of channels
// by lanes, and sums in double.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/batch_norm_channels.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Vectors of T in the type that it is computed in, and in double for sums.
template <typename T>
struct NormLanes {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using V = typename W::Type;
  using Lanes = Vec<Lane>;
  using Doubles = Vec<double>;
  static constexpr int kLanes = W::kLanes;
  static constexpr int kParts = kLanes / Doubles::kLanes;

  struct Sum {
    typename Doubles::Type part[kParts];

    static TORCHCONV_INLINE Sum load(const double* from) {
      Sum sum;
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) sum.part[i] = Doubles::load(from + i * Doubles::kLanes);
      return sum;
    }
    TORCHCONV_INLINE void store(double* to) const {
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) Doubles::store(to + i * Doubles::kLanes, part[i]);
    }
    TORCHCONV_INLINE void add(const Sum& other) {
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) part[i] += other.part[i];
    }
    TORCHCONV_INLINE void add_product(const Sum& one, const Sum& other) {
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) part[i] += one.part[i] * other.part[i];
    }
    TORCHCONV_INLINE double total() const {
      auto lanes = part[0];
      if constexpr (kParts > 1) lanes += part[1];
      double sum = 0;
      for (int i = 0; i < Doubles::kLanes; ++i) sum += lanes[i];
      return sum;
    }
  };

  static TORCHCONV_INLINE Sum widen(V v) {
    Sum wide;
    typename Vec<Lane, kLanes / kParts>::Type narrow[kParts];
    std::memcpy(&narrow, &v, sizeof(v));
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i)
      wide.part[i] = convert<double, Lane, kLanes / kParts>(narrow[i]);
    return wide;
  }

  // The first n lanes of v, and of `others` the rest.
  static TORCHCONV_INLINE V first(V v, int64_t n, V others) {
    using Index = std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t>;
    using Indices = Vec<Index>;
    return Indices::iota() < Indices::broadcast(static_cast<Index>(n)) ? v : others;
  }

  template <bool kPartial>
  static TORCHCONV_INLINE V load(const T* p, int64_t n) {
    return kPartial ? W::load_partial(p, n) : W::load(p);
  }
  template <bool kPartial>
  static TORCHCONV_INLINE void store(T* p, V v, int64_t n, bool streams) {
    if constexpr (kPartial) {
      W::store_partial(p, v, n);
    } else {
      W::store(p, v, streams);
    }
  }

  static TORCHCONV_INLINE V broadcast(double x) { return Lanes::broadcast(static_cast<Lane>(x)); }

  // A constant of `count` channels, each in its lane.
  static void put(Lane* lanes, int64_t count, const PerChannel& values) {
    for (int64_t i = 0; i < count; ++i) lanes[i] = static_cast<Lane>(values[i]);
  }
};

}  // namespace torchconv::cpu
