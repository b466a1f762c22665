// Max, min and average pooling of planes (NCHW) with one output each: global pooling, one pass over
// the input with vectors along the rows, or along the whole plane where the window covers it.
//
// A lane sees every kLanes-th element, so two lanes are folded in the order of their positions: the
// first of equal maxima, the last of several NaN, as if the elements had come one after another.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/buffer.h"
#include "cpu/pool2d_rules.h"

namespace torchconv::cpu {

// Whether planes have one output, whose elements a lane can count (pool2d_geometry.cpp).
bool is_global(const PoolProblem& p, int lanes);

template <typename Rule, bool kCodes>
class PoolGlobal {
  using T = typename Rule::Element;
  using W = WideVec<T>;
  using Lane = typename Rule::Lane;
  using Code = typename Rule::Code;
  using V = typename Rule::V;
  using C = typename Rule::C;
  using Divisors = typename Rule::Divisors;
  using Values = Vec<Lane>;
  using Codes = Vec<Code>;
  static constexpr int kLanes = Rule::kLanes;

 public:
  static bool applies(const PoolProblem& p) { return is_global(p, kLanes); }

  PoolGlobal(const PoolProblem& p, Rule rule, const T* x, T* y, SelectedArray selected)
      : p_(p),
        rule_(rule),
        x_(x),
        y_(y),
        selected_(selected),
        rows_(valid(vertical_axis(p))),
        columns_(valid(horizontal_axis(p))),
        same_offset_(p.S == p.W && p.pad_h == 0 && p.pad_w == 0) {
    if (columns_.size() == p.W) {
      columns_ = {columns_.begin + rows_.begin * p.W, columns_.begin + rows_.end * p.W};
      rows_ = {0, 1};
    }
  }

  void run(const Parallel& pool) const {
    const int64_t bytes =
        (rows_.size() * columns_.size() + kLanes) * static_cast<int64_t>(sizeof(T));
    parallel_for_with_scratch(
        pool, 0, p_.N * p_.C, pool_grain(bytes), [&](int64_t begin, int64_t end) {
          Divisors divisors(p_, vertical_axis(p_), horizontal_axis(p_), 1);
          const Lane* divisor = divisors.at(0);
          if (!kCodes) {
            for (int64_t i = begin; i < end; i += kLanes)
              planes(i, std::min<int64_t>(end - i, kLanes), divisor);
            return;
          }
          const Buffer<Code> codes(kCodes ? kBatch + kLanes : 0);
          for (int64_t i = begin; i < end;) {
            const int64_t first = i;
            for (const int64_t last = std::min(end, i + kBatch); i < last; i++) {
              const Lane value = plane(x_ + i * p_.H * p_.W, &codes[i - first]);
              y_[i] = from_wide<T>(rule_.finish_all(Values::broadcast(value), divisor)[0]);
            }
            selected_.store(first, codes.get(), i - first);
          }
        });
  }

 private:
  static constexpr int64_t kBatch = 2048;  // planes whose codes are stored together

  // Elements of the window that are in the image.
  static Range valid(const Axis& axis) {
    const Range taps = axis.valid_taps(0);
    return {axis.start(0) + taps.begin, axis.start(0) + taps.end};
  }

  // The values of n <= kLanes planes from the i-th on.
  void planes(int64_t i, int64_t n, const Lane* divisor) const {
    V values[kLanes] = {};
    C unused;
    for (int64_t j = 0; j < n; j++) values[j] = fold_plane(x_ + (i + j) * p_.H * p_.W, &unused);
    const V all = fold_each<Lane>(values, [](V a, V b) {
      C code{};
      Rule::template fold<false>(&a, &code, b, code);
      return a;
    });
    const V result = rule_.finish_all(all, divisor);
    if (n == kLanes) {
      W::store(y_ + i, result);
    } else {
      W::store_partial(y_ + i, result, n);
    }
  }

  // At least kLanes elements, in any order.
  TORCHCONV_INLINE V fold_run(const T* x, int64_t count) const {
    V best = rule_.prepare(W::load(x));
    C code{};
    int64_t i = kLanes;
    for (; i + kLanes <= count; i += kLanes)
      Rule::template fold<false>(&best, &code, rule_.prepare(W::load(x + i)), code);
    if (i < count) {
      const V last =
          Rule::kRepeats ? W::load(x + count - kLanes) : W::load_partial(x + i, count - i);
      Rule::template fold<false>(&best, &code, rule_.prepare(last), code);
    }
    return best;
  }

  Lane plane(const T* x, Code* code) const {
    C at;
    const V best = fold_plane(x, &at);
    return fold_lanes(best, at, code);
  }

  // Every kLanes-th element to one lane.
  TORCHCONV_INLINE V fold_plane(const T* x, C* position_of_best) const {
    const int64_t origin = rows_.begin * p_.W + columns_.begin;
    V best;
    C at = Codes::broadcast(static_cast<Code>(origin));
    if constexpr (Rule::kRepeats) {
      best = rule_.prepare(W::broadcast(to_wide<T>(x[origin])));
    } else {
      best = V{};
    }
    for (int64_t h = rows_.begin; h < rows_.end; h++) {
      const int64_t end = h * p_.W + columns_.end;
      int64_t i = h * p_.W + columns_.begin;
      C position = Codes::iota() + static_cast<Code>(i);
      for (; i + kLanes <= end; i += kLanes, position += static_cast<Code>(kLanes))
        Rule::template fold<kCodes>(&best, &at, rule_.prepare(W::load(x + i)), position);
      if (i < end) fold_tail(x, i, end - i, position, &best, &at);
    }
    *position_of_best = at;
    return best;
  }

  // The lanes past the n elements repeat the last one, or add nothing.
  TORCHCONV_INLINE void fold_tail(const T* x, int64_t i, int64_t n, C position, V* best,
                                  C* at) const {
    V v = W::load_partial(x + i, n);
    if constexpr (Rule::kRepeats) {
      const C valid = Codes::iota() < Codes::broadcast(static_cast<Code>(n));
      const C last = Codes::broadcast(static_cast<Code>(i + n - 1));
      v = valid ? v : W::broadcast(to_wide<T>(x[i + n - 1]));
      position = position < last ? position : last;
    }
    Rule::template fold<kCodes>(best, at, rule_.prepare(v), position);
  }

  Lane fold_lanes(V values, C positions, Code* code) const {
    fold_halves<kLanes / 2>(&values, &positions);
    if (kCodes) *code = static_cast<Code>(named(positions[0]));
    return values[0];
  }

  // Each lane with the one n further, then n / 2, ..., 1 further.
  template <int n>
  static TORCHCONV_INLINE void fold_halves(V* a, C* at) {
    const V b = rotate_lanes<Lane, n>(*a);
    if constexpr (!Rule::kRepeats || !kCodes) {
      Rule::template fold<false>(a, at, b, *at);
    } else {
      const C b_at = rotate_lanes<Code, n>(*at);
      const C in_order = b_at > *at;
      const V second = in_order ? b : *a;
      const C second_at = in_order ? b_at : *at;
      *a = in_order ? *a : b;
      *at = in_order ? *at : b_at;
      Rule::template fold<true>(a, at, second, second_at);
    }
    if constexpr (n > 1) fold_halves<n / 2>(a, at);
  }

  // The position as it is stored: as it is, or as the offset in the window.
  int64_t named(int64_t position) const {
    if (selected_.kind == Selected::kIndex64 || same_offset_) return position;
    return (position / p_.W + p_.pad_h) * p_.S + position % p_.W + p_.pad_w;
  }

  const PoolProblem& p_;
  Rule rule_;
  const T* x_;
  T* y_;
  SelectedArray selected_;
  Range rows_, columns_;
  bool same_offset_;  // the offset in the window is the position in the plane
};

}  // namespace torchconv::cpu
