// Pooling's backward on pixels (NHWC): vectors over channels; a pixel of dx visits the outputs
// whose windows contain it and adds their gradients where they selected it, or all of them, over
// their divisors, for the average.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "cpu/avg_pool2d.h"
#include "cpu/pool2d_backward.h"
#include "cpu/pool_simd.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// O is the type of selections: uint8_t, uint16_t, int32_t, int64_t, or void for the average.
template <typename T, typename O>
class PixelsBackward {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using V = typename W::Type;
  using C = typename Vec<LaneInt<T>>::Type;
  static constexpr int kLanes = W::kLanes;
  static constexpr bool kAverage = std::is_void_v<O>;
  static constexpr bool kIndex = std::is_same_v<O, int64_t>;

 public:
  PixelsBackward(const PoolProblem& p, const T* dy, const O* selected, T* dx)
      : p_(p),
        dy_(dy),
        selected_(selected),
        dx_(dx),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)),
        rows_(vertical_),
        columns_(horizontal_) {
    if (!kAverage) return;
    for (int64_t out_p = 0; out_p < p.P; out_p++)
      row_factors_.push_back(vertical_factor(p, vertical_, out_p));
    for (int64_t q = 0; q < p.Q; q++)
      column_factors_.push_back(horizontal_factor(p, horizontal_, q));
    for (int64_t w = 0; w < p.W; w++)
      one_column_factor_.push_back(one_factor(columns_, w, column_factors_));
  }

  void run(const Parallel& pool) const {
    const int64_t vectors = ceil_div(p_.C, kLanes) * kLanes;
    const int64_t taps =
        ceil_div(std::min(p_.R, p_.H), p_.stride_h) * ceil_div(std::min(p_.S, p_.W), p_.stride_w);
    const int64_t row_bytes = p_.W * vectors * static_cast<int64_t>(sizeof(T)) * (taps + 2);
    parallel_for(pool, 0, p_.N * p_.H, pool_grain(row_bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) input_row(i / p_.H, i % p_.H, dx_ + end * p_.W * p_.C);
    });
  }

 private:
  // The pixel (n, h, w) of dx, and whether all its outputs have the divisor of the first.
  struct Pixel {
    int64_t n, h, w;
    bool one_divisor;
    Lane divisor;
  };

  void input_row(int64_t n, int64_t h, const T* dx_end) const {
    const bool one_row_factor = kAverage && one_factor(rows_, h, row_factors_);
    for (int64_t w = 0; w < p_.W; w++) {
      Pixel pixel = {n, h, w, true, Lane{1}};
      if (kAverage && rows_.count(h) > 0 && columns_.count(w) > 0) {
        pixel.one_divisor = one_row_factor && one_column_factor_[static_cast<size_t>(w)];
        pixel.divisor = divisor(*rows_.begin(h), *columns_.begin(w));
      }
      channels(pixel, dx_ + ((n * p_.H + h) * p_.W + w) * p_.C, dx_end);
    }
  }

  static bool one_factor(const Contributions& outputs, int64_t e,
                         const std::vector<int64_t>& factors) {
    for (const Contribution* o = outputs.begin(e); o != outputs.end(e); o++) {
      if (factors[static_cast<size_t>(o->output)] !=
          factors[static_cast<size_t>(outputs.begin(e)->output)])
        return false;
    }
    return true;
  }

  Lane divisor(const Contribution& row, const Contribution& column) const {
    return static_cast<Lane>(row_factors_[static_cast<size_t>(row.output)] *
                             column_factors_[static_cast<size_t>(column.output)]);
  }

  void channels(const Pixel& pixel, T* dx, const T* dx_end) const {
    int64_t c = 0;
    for (; c + 4 * kLanes <= p_.C; c += 4 * kLanes) gather<4, false>(pixel, c, kLanes, dx);
    for (; c + kLanes <= p_.C; c += kLanes) gather<1, false>(pixel, c, kLanes, dx);
    if (c == p_.C) return;
    // The last vector spills into the next pixel, which is written after it, but not past dx_end;
    // and it may read what follows the channels, but not past the tensor.
    const bool reads = rows_.count(pixel.h) > 0 && columns_.count(pixel.w) > 0;
    const int64_t last = reads ? (pixel.n * p_.P + (rows_.end(pixel.h) - 1)->output) * p_.Q +
                                     (columns_.end(pixel.w) - 1)->output
                               : 0;
    const int64_t readable = (p_.N * p_.P * p_.Q - last) * p_.C - c;
    if (dx_end - (dx + c) >= kLanes && (!reads || readable >= kLanes)) {
      gather<1, false>(pixel, c, kLanes, dx);
    } else {
      gather<1, true>(pixel, c, p_.C - c, dx);
    }
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void gather(const Pixel& pixel, int64_t c, int64_t n, T* dx) const {
    V sum[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) sum[i] = V{};
    const Contribution* const last_row = rows_.end(pixel.h);
    const Contribution* const first_column = columns_.begin(pixel.w);
    const Contribution* const last_column = columns_.end(pixel.w);
    for (const Contribution* row = rows_.begin(pixel.h); row != last_row; row++) {
      const int64_t line = (pixel.n * p_.P + row->output) * p_.Q;
      for (const Contribution* column = first_column; column != last_column; column++) {
        const int64_t from = (line + column->output) * p_.C + c;
        const int64_t code = kIndex ? pixel.h * p_.W + pixel.w : row->tap * p_.S + column->tap;
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
          const T* at = dy_ + from + i * kLanes;
          V v = kPartial ? W::load_partial(at, n) : W::load(at);
          if constexpr (kAverage) {
            if (!pixel.one_divisor) v /= divisor(*row, *column);
            sum[i] += v;
          } else {
            const C equal = matches<kPartial>(selected_ + from + i * kLanes, code, n);
            sum[i] += equal ? v : V{};
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      if (kAverage && pixel.one_divisor) sum[i] /= pixel.divisor;
      T* to = dx + c + i * kLanes;
      if constexpr (kPartial) {
        W::store_partial(to, sum[i], n);
      } else {
        W::store(to, sum[i]);
      }
    }
  }

  // Lanes of all ones where the selection is code.
  template <bool kPartial, typename Stored>
  static TORCHCONV_INLINE C matches(const Stored* selected, int64_t code, int64_t n) {
    using Codes = Vec<Stored, kLanes>;
    using Code = LaneInt<T>;
    const auto held = kPartial ? Codes::load_partial(selected, n) : Codes::load(selected);
    if constexpr (sizeof(Stored) <= sizeof(Code)) {
      const C wanted = Vec<Code>::broadcast(static_cast<Code>(code));
      return convert<Code, Stored, kLanes>(held) == wanted;
    } else {
      return convert<Code, Stored, kLanes>(held == Codes::broadcast(static_cast<Stored>(code)));
    }
  }

  const PoolProblem& p_;
  const T* dy_;
  const O* selected_;
  T* dx_;
  Axis vertical_, horizontal_;
  Contributions rows_, columns_;
  std::vector<bool> one_column_factor_;
  std::vector<int64_t> row_factors_, column_factors_;  // of the average's divisors
};

}  // namespace torchconv::cpu
