// How pooling folds a window's elements into one, selecting or averaging, on the GPU.
//
// A candidate replaces the selected element where it is greater or NaN, so the first of equal
// maxima is kept but the last NaN wins, as in PyTorch. Beside the value goes a code, r * S + s of
// its tap; without a valid tap it has all bits set. The minimum is the maximum of mirrored values,
// and an unsigned integer is compared as a signed one: Mirror is both, exact, and its own inverse.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "core/pool_problem.h"
#include "cuda/element.h"

namespace torchconv::cuda {

// T is a floating-point type or a signed integer.
template <typename T>
struct Mirror {
  static constexpr bool kInteger = std::is_integral_v<T>;
  std::conditional_t<kInteger, T, bool> bits{};  // of an integer, that change; or whether to negate

  Mirror() = default;
  Mirror(Select select, bool is_unsigned) {
    const bool minimum = select == Select::kMin;
    if constexpr (kInteger) {
      bits = static_cast<T>(minimum ? -1 : 0);
      if (is_unsigned) bits = static_cast<T>(bits ^ std::numeric_limits<T>::min());
    } else {
      bits = minimum;
    }
  }
  __device__ __forceinline__ Wide<T> operator()(Wide<T> v) const {
    if constexpr (kInteger)
      return static_cast<T>(v ^ bits);
    else
      return bits ? -v : v;
  }
};

template <typename T>
__host__ __device__ __forceinline__ Wide<T> lowest() {
  if constexpr (std::is_integral_v<T>)
    return std::numeric_limits<T>::min();
  else
    return -std::numeric_limits<Wide<T>>::infinity();
}

// Quotients by one divisor, rounded as division rounds them; in float with its reciprocal, by
// Markstein's correction (Computation of Elementary Functions on the IBM RISC System/6000, 1990).
template <typename A>
struct Division {
  A divisor, reciprocal;

  explicit __device__ __forceinline__ Division(A d) : divisor(d), reciprocal(A{1} / d) {}
  __device__ __forceinline__ A operator()(A x) const {
    if constexpr (sizeof(A) == 8) {
      return x / divisor;
    } else {
      const A quotient = x * reciprocal;
      const A rest = fmaf(-quotient, divisor, x);
      return rest == rest ? fmaf(rest, reciprocal, quotient) : quotient;  // infinite, NaN
    }
  }
};

template <typename T>
struct Selection {
  using Element = T;
  using Value = Wide<T>;
  static constexpr bool kSelects = true;
  struct State {
    Value value;
    uint32_t code;
  };
  Mirror<T> mirror;

  static __device__ __forceinline__ Value none() { return lowest<T>(); }
  static __device__ __forceinline__ State start(uint32_t first_code) {
    return {none(), first_code};
  }
  static __device__ __forceinline__ State first(Value x) { return {x, 0}; }
  __device__ __forceinline__ Value prepare(T x) const { return mirror(to_wide(x)); }
  static __device__ __forceinline__ void fold(State& best, Value x, uint32_t code) {
    const bool better = x > best.value || x != x;
    best.value = better ? x : best.value;
    best.code = better ? code : best.code;
  }
  // A row of a window goes on with what the rows before it selected.
  static __device__ __forceinline__ State begin_row(const State& total) { return total; }
  static __device__ __forceinline__ void end_row(State& total, const State& row) { total = row; }
  // A row that was folded by itself, its codes counted from `code`.
  static __device__ __forceinline__ void join(State& total, const State& row, uint32_t code) {
    fold(total, row.value, row.code + code);
  }
  // Of two parts of a window whose taps alternate.
  static __device__ __forceinline__ void merge(State& a, const State& b) {
    const bool nan_a = a.value != a.value, nan_b = b.value != b.value;
    const bool later = nan_b && (!nan_a || static_cast<int32_t>(b.code - a.code) > 0);
    const bool better = !nan_a && (b.value > a.value || (b.value == a.value && b.code < a.code));
    if (later || better) a = b;
  }
  __device__ __forceinline__ T finish(const State& best, const Division<Value>&) const {
    return from_wide<T>(mirror(best.value));
  }
};

template <typename T>
struct Averaging {
  using Element = T;
  using Value = Wide<T>;
  static constexpr bool kSelects = false;
  struct State {
    Value sum;
  };

  static __device__ __forceinline__ Value none() { return Value{0}; }
  static __device__ __forceinline__ State start(uint32_t) { return {Value{0}}; }
  static __device__ __forceinline__ State first(Value x) { return {x}; }
  static __device__ __forceinline__ Value prepare(T x) { return to_wide(x); }
  static __device__ __forceinline__ void fold(State& total, Value x, uint32_t) { total.sum += x; }
  // Summed in two levels, which keeps the sum of a large window exact enough.
  static __device__ __forceinline__ State begin_row(const State&) { return {Value{0}}; }
  static __device__ __forceinline__ void end_row(State& total, const State& row) {
    total.sum += row.sum;
  }
  static __device__ __forceinline__ void join(State& total, const State& row, uint32_t) {
    total.sum += row.sum;
  }
  static __device__ __forceinline__ void merge(State& a, const State& b) { a.sum += b.sum; }
  static __device__ __forceinline__ T finish(const State& total, const Division<Value>& over) {
    return from_wide<T>(over(total.sum));
  }
};

// 16 bytes of elements of at most four bytes, held as words: filling, and loading where a predicate
// says so, then takes four instructions for 16-bit types too.
template <typename T>
struct alignas(16) Pack {
  uint32_t word[4];

  static __device__ __forceinline__ Pack filled(T v) {
    uint32_t bits = 0;
    memcpy(&bits, &v, sizeof(T));
    if (sizeof(T) == 2) bits |= bits << 16;
    return {{bits, bits, bits, bits}};
  }
  static __device__ __forceinline__ Pack load(const T* p) {
    return *reinterpret_cast<const Pack*>(p);
  }
  __device__ __forceinline__ void set_half(int half, const T* p) {
    const auto words = *reinterpret_cast<const Vector<uint32_t, 2>*>(p);
    word[2 * half] = words.element[0], word[2 * half + 1] = words.element[1];
  }
  __device__ __forceinline__ void set(int i, T v) {
    uint32_t bits = 0;
    memcpy(&bits, &v, sizeof(T));
    if constexpr (sizeof(T) == 4)
      word[i] = bits;
    else
      word[i / 2] = i % 2 == 0 ? bits : word[i / 2] | bits << 16;  // in ascending order
  }
  __device__ __forceinline__ float at(int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word[i]);
    } else {
      const auto bits = static_cast<uint16_t>(word[i / 2] >> (i % 2 * 16));
      T v;
      memcpy(&v, &bits, sizeof(T));
      return to_wide(v);
    }
  }
};

// Where selections go, and of which kind; no data where they are not wanted.
struct SelectedOutput {
  Selected kind;
  void* data;
};
// Where they come from.
struct SelectedArray {
  Selected kind;
  const void* data;
};

// An offset, as unsigned as it is stored.
template <typename I>
__device__ __forceinline__ uint32_t load_code(const SelectedArray& selected, I position) {
  return selected.kind == Selected::kOffset8 ? static_cast<const uint8_t*>(selected.data)[position]
         : selected.kind == Selected::kOffset16
             ? static_cast<const uint16_t*>(selected.data)[position]
             : static_cast<const uint32_t*>(selected.data)[position];
}

// n elements, in pieces of 16 bytes at most; p is aligned to a piece.
template <typename O, int n, typename F>
__device__ __forceinline__ void store_all(O* p, F&& value) {
  constexpr int kPiece = n < kLanes<O> ? n : kLanes<O>;
#pragma unroll
  for (int i = 0; i < n; i += kPiece) {
    Vector<O, kPiece> piece;
#pragma unroll
    for (int j = 0; j < kPiece; j++) piece.element[j] = value(i + j);
    *reinterpret_cast<Vector<O, kPiece>*>(p + i) = piece;
  }
}

inline int64_t size_of(Selected kind) {
  return kind == Selected::kOffset8    ? 1
         : kind == Selected::kOffset16 ? 2
         : kind == Selected::kOffset32 ? 4
                                       : 8;
}
// As store_all needs it, for the codes of n outputs.
inline bool aligned_codes(Selected kind, const void* data, int n) {
  return reinterpret_cast<uintptr_t>(data) %
             static_cast<size_t>(std::min<int64_t>(n * size_of(kind), 16)) ==
         0;
}
inline SelectedOutput part_of(const SelectedOutput& selected, int64_t position) {
  if (selected.data == nullptr) return selected;
  return {selected.kind, static_cast<char*>(selected.data) + position * size_of(selected.kind)};
}
inline SelectedArray part_of(const SelectedArray& selected, int64_t position) {
  return {selected.kind,
          static_cast<const char*>(selected.data) + position * size_of(selected.kind)};
}

// The codes of n outputs from `position` on; code(i) is the one of output i, index(i) its index.
template <int n, typename Code, typename Index>
__device__ __forceinline__ void store_codes(const SelectedOutput& selected, int64_t position,
                                            Code&& code, Index&& index) {
  switch (selected.kind) {
    case Selected::kOffset8:
      return store_all<uint8_t, n>(static_cast<uint8_t*>(selected.data) + position,
                                   [&](int i) { return static_cast<uint8_t>(code(i)); });
    case Selected::kOffset16:
      return store_all<uint16_t, n>(static_cast<uint16_t*>(selected.data) + position,
                                    [&](int i) { return static_cast<uint16_t>(code(i)); });
    case Selected::kOffset32:
      return store_all<int32_t, n>(static_cast<int32_t*>(selected.data) + position,
                                   [&](int i) { return static_cast<int32_t>(code(i)); });
    case Selected::kIndex64:
      return store_all<int64_t, n>(static_cast<int64_t*>(selected.data) + position, index);
  }
}

}  // namespace torchconv::cuda
