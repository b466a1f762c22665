// What the pooling kernels of both layouts are made of: the rule that folds a window's elements
// into one, selecting or averaging, and where selections go.
//
// A candidate replaces the selected element where it is greater or NaN, so the first of equal
// maxima is kept but the last NaN wins, as in PyTorch. Folding is associative: a window may be
// folded row by row and the rows' results folded in order. Minimum pooling runs the same code on
// values mirrored when they are loaded (-x, ~x) and mirrored back when they are stored, both exact,
// by an exclusive or with a mask chosen at run time.
//
// Beside the value a lane carries a code, base + r * step_r + s * step_s of its element: with
// (0, S, 1) the offset in the window, with other steps the index in the image.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/avg_pool2d.h"
#include "cpu/pool2d.h"
#include "cpu/pool_simd.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// What every rule has: the types of a lane and of its code.
template <typename T>
struct Rule {
  using Element = T;
  using W = WideVec<T>;
  using V = typename W::Type;
  using Lane = Wide<T>;
  using Code = LaneInt<T>;
  using C = typename Vec<Code>::Type;
  static constexpr int kLanes = W::kLanes;
  // Inputs from this many bytes on come from memory, not from cache, and are prefetched; so many
  // elements ahead.
  static constexpr int64_t kPrefetchedSize = 8 << 20;
  static constexpr int64_t kAhead = 4096 / static_cast<int64_t>(sizeof(T));
};

// kUnroll (vectors of channels at once, 16, 4 or 1) and kStride2 (code of its own for stride 2)
// are spent on the types that networks use; the integers keep the library small. kRepeats: folding
// an element in twice changes nothing.
template <typename T>
struct Selection : Rule<T> {
  using Divisors = NoDivisors;
  using typename Rule<T>::V;
  using typename Rule<T>::Lane;
  using typename Rule<T>::Code;
  using typename Rule<T>::C;
  static constexpr int kUnroll = 16;
  static constexpr bool kStride2 = true;
  static constexpr bool kRepeats = true;
  Code mirror = 0;  // the sign's bit for the minimum

  // X is a lane or a vector of them.
  template <typename X>
  TORCHCONV_INLINE X prepare(X x) const {
    if constexpr (std::is_arithmetic_v<X>)
      return mirror != 0 ? -x : x;
    else
      return reinterpret_cast<X>(reinterpret_cast<C>(x) ^ mirror);
  }
  TORCHCONV_INLINE V finish(V x, const Lane*) const { return prepare(x); }
  TORCHCONV_INLINE V finish_all(V x, const Lane*) const { return prepare(x); }
  // What a window without a valid element gives.
  Lane none() const { return prepare(-std::numeric_limits<Lane>::infinity()); }

  template <bool kCodes, typename X, typename I>
  static TORCHCONV_INLINE void fold(X* best, I* code, X candidate, I candidate_code) {
    if constexpr (kCodes) {
      take_greater(best, code, candidate, candidate_code);
    } else {
      *best = maximum(candidate, *best);  // of equals, +0 and -0 too, the second operand stays
    }
  }
};

template <typename T>
struct IntegerSelection : Rule<T> {
  using Divisors = NoDivisors;
  using typename Rule<T>::V;
  using typename Rule<T>::Lane;
  static constexpr int kUnroll = 1;
  static constexpr bool kStride2 = false;
  static constexpr bool kRepeats = true;
  Lane mirror = 0;  // all bits of T for the minimum

  template <typename X>
  TORCHCONV_INLINE X prepare(X x) const {
    return x ^ mirror;
  }
  TORCHCONV_INLINE V finish(V x, const Lane*) const { return prepare(x); }
  TORCHCONV_INLINE V finish_all(V x, const Lane*) const { return prepare(x); }
  Lane none() const { return prepare(Lane{std::numeric_limits<T>::lowest()}); }

  template <bool kCodes, typename X, typename I>
  static TORCHCONV_INLINE void fold(X* best, I* code, X candidate, I candidate_code) {
    const auto better = candidate > *best;
    *best = better ? candidate : *best;
    if constexpr (kCodes) *code = better ? candidate_code : *code;
  }
};

template <typename T>
struct Averaging : Rule<T> {
  using Divisors = DivisorRow<Wide<T>>;
  using typename Rule<T>::V;
  using typename Rule<T>::Lane;
  static constexpr int kUnroll = 16;
  static constexpr bool kStride2 = true;
  static constexpr bool kRepeats = false;

  template <typename X>
  TORCHCONV_INLINE X prepare(X x) const {
    return x;
  }
  // Each lane by its divisor, or all by one.
  TORCHCONV_INLINE V finish(V sum, const Lane* divisors) const {
    return sum / Vec<Lane>::load(divisors);
  }
  TORCHCONV_INLINE V finish_all(V sum, const Lane* divisor) const { return sum / *divisor; }
  Lane none() const { return Lane{0}; }

  template <bool kCodes, typename X, typename I>
  static TORCHCONV_INLINE void fold(X* sum, I*, X candidate, I) {
    *sum += candidate;
  }
};

// The output array of selections. Codes are stored modulo 2^bits, so -1 becomes kNoOffset. Kernels
// collect codes in scratch memory and store them together; whole vectors of codes are read.
struct SelectedArray {
  Selected kind;
  void* data;

  void store(int64_t position, const int32_t* codes, int64_t n) const;
  void store(int64_t position, const int64_t* codes, int64_t n) const;

  // Byte offsets, the usual kind, go straight to memory and are not collected.
  bool direct() const { return kind == Selected::kOffset8; }
  uint8_t* bytes() const { return static_cast<uint8_t*>(data); }

  // One vector, of which n lanes count.
  template <typename Code>
  TORCHCONV_INLINE void store_bytes(int64_t position, typename Vec<Code>::Type codes,
                                    int64_t n) const {
    using Bytes = Vec<uint8_t, Vec<Code>::kLanes>;
    const auto v = convert<uint8_t, Code, Vec<Code>::kLanes>(codes);
    if (n >= Bytes::kLanes) {
      Bytes::store(bytes() + position, v);
    } else {
      Bytes::store_partial(bytes() + position, v, n);
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

int64_t index_from_offset(const PoolProblem& p, int64_t offset, int64_t out_p, int64_t out_q);

}  // namespace torchconv::cpu
