// What the pooling kernels of both layouts are made of: the rule that folds a window's elements
// into one, selecting or averaging, and where selections go.
//
// A candidate replaces the selected element where it is greater or NaN, so the first of equal
// maxima is kept but the last NaN wins, as in PyTorch. Folding is associative: a window may be
// folded row by row and the rows' results folded in order. Minimum pooling runs the same code on
// values mirrored when they are loaded (-x, ~x) and mirrored back when they are stored, both exact.
//
// Beside the value a lane carries a code, base + r * step_r + s * step_s of its element: with
// (0, S, 1) the offset in the window, with other steps the index in the image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/avg_pool2d.h"
#include "cpu/pool2d.h"
#include "cpu/pool_simd.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

template <typename T, bool kMin>
struct Selection {
  using Element = T;
  using Divisors = NoDivisors;
  using W = WideVec<T>;
  using V = typename W::Type;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using C = typename Vec<Code>::Type;
  static constexpr int kLanes = W::kLanes;

  // X is a lane or a vector of them.
  template <typename X>
  static TORCHCONV_INLINE X prepare(X x) {
    if constexpr (!kMin) {
      return x;
    } else if constexpr (std::is_integral_v<Lane>) {
      return ~x;
    } else {
      return -x;
    }
  }

  static TORCHCONV_INLINE V finish(V x, const Lane*) { return prepare(x); }
  static TORCHCONV_INLINE V finish_all(V x, const Lane*) { return prepare(x); }

  // What a window without a valid element gives.
  static Lane none() {
    using Limits = std::conditional_t<std::is_integral_v<T>, T, Lane>;
    return kMin ? highest_value<Limits>() : lowest_value<Limits>();
  }

  template <bool kCodes, typename X, typename I>
  static TORCHCONV_INLINE void fold(X* best, I* code, X candidate, I candidate_code) {
    const auto better = (candidate > *best) | (candidate != candidate);
    *best = better ? candidate : *best;
    if constexpr (kCodes) *code = better ? candidate_code : *code;
  }
};

template <typename T>
struct Averaging {
  using Element = T;
  using Divisors = DivisorRow<Wide<T>>;
  using W = WideVec<T>;
  using V = typename W::Type;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using C = typename Vec<Code>::Type;
  static constexpr int kLanes = W::kLanes;

  template <typename X>
  static TORCHCONV_INLINE X prepare(X x) {
    return x;
  }
  // Each lane by its divisor, or all by one.
  static TORCHCONV_INLINE V finish(V sum, const Lane* divisors) {
    return sum / Vec<Lane>::load(divisors);
  }
  static TORCHCONV_INLINE V finish_all(V sum, const Lane* divisor) { return sum / *divisor; }
  static Lane none() { return Lane{0}; }

  template <bool kCodes, typename X, typename I>
  static TORCHCONV_INLINE void fold(X* sum, I*, X candidate, I) {
    *sum += candidate;
  }
};

// The output array of selections. Codes are stored modulo 2^bits, so -1 becomes kNoOffset.
struct SelectedArray {
  Selected kind;
  void* data;

  template <typename Code, bool kPartial>
  TORCHCONV_INLINE void store(int64_t position, typename Vec<Code>::Type code, int64_t n) const {
    switch (kind) {
      case Selected::kOffset8:
        return store_as<uint8_t, Code, kPartial>(position, code, n);
      case Selected::kOffset16:
        return store_as<uint16_t, Code, kPartial>(position, code, n);
      case Selected::kOffset32:
        return store_as<int32_t, Code, kPartial>(position, code, n);
      case Selected::kIndex64:
        return store_as<int64_t, Code, kPartial>(position, code, n);
    }
  }

  void store_none(int64_t position) const {
    switch (kind) {
      case Selected::kOffset8:
        static_cast<uint8_t*>(data)[position] = kNoOffset<uint8_t>;
        return;
      case Selected::kOffset16:
        static_cast<uint16_t*>(data)[position] = kNoOffset<uint16_t>;
        return;
      case Selected::kOffset32:
        static_cast<int32_t*>(data)[position] = kNoOffset<int32_t>;
        return;
      case Selected::kIndex64:
        static_cast<int64_t*>(data)[position] = kNoOffset<int64_t>;
        return;
    }
  }

 private:
  template <typename O, typename Code, bool kPartial>
  TORCHCONV_INLINE void store_as(int64_t position, typename Vec<Code>::Type code, int64_t n) const {
    constexpr int kLanes = Vec<Code>::kLanes;
    O* p = static_cast<O*>(data) + position;
    if constexpr (kPartial && sizeof(O) > sizeof(Code)) {
      O wide[kLanes];
      Vec<O, kLanes>::store(wide, convert<O, Code, kLanes>(code));
      for (int64_t i = 0; i < n; i++) p[i] = wide[i];
    } else if constexpr (kPartial) {
      Vec<O, kLanes>::store_partial(p, convert<O, Code, kLanes>(code), n);
    } else {
      Vec<O, kLanes>::store(p, convert<O, Code, kLanes>(code));
    }
  }
};

// How codes count. An index that does not fit a 4-byte lane is carried as an offset in the window
// and turned into the index when its output row is finished (index_from_offset).
struct CodeSteps {
  bool index;
  bool finish;

  template <typename Code>
  static CodeSteps choose(const PoolProblem& p, Selected kind) {
    const bool index = kind == Selected::kIndex64;
    const bool fits = sizeof(Code) == 8 || p.H * p.W <= INT32_MAX;
    return {index && fits, index && !fits};
  }
};

inline int64_t index_from_offset(const PoolProblem& p, int64_t offset, int64_t out_p,
                                 int64_t out_q) {
  if (offset < 0) return offset;
  const int64_t h = out_p * p.stride_h - p.pad_h + offset / p.S * p.dilation_h;
  const int64_t w = out_q * p.stride_w - p.pad_w + offset % p.S * p.dilation_w;
  return h * p.W + w;
}

}  // namespace torchconv::cpu
