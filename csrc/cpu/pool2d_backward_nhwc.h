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

 public:
  PixelsBackward(const PoolProblem& p, const T* dy, const O* selected, T* dx)
      : p_(p),
        dy_(dy),
        selected_(selected),
        dx_(dx),
        vertical_(vertical_axis(p)),
        horizontal_(horizontal_axis(p)) {
    first_.push_back(0);
    for (int64_t w = 0; w < p.W; w++) {
      append_contributions(horizontal_, w, 0, p.Q, &columns_);
      first_.push_back(columns_.size());
    }
  }

  void run(const Parallel& pool) const {
    const int64_t vectors = ceil_div(p_.C, kLanes) * kLanes;
    const int64_t taps =
        ceil_div(std::min(p_.R, p_.H), p_.stride_h) * ceil_div(std::min(p_.S, p_.W), p_.stride_w);
    const int64_t row_bytes = p_.W * vectors * static_cast<int64_t>(sizeof(T)) * (taps + 2);
    parallel_for_with_scratch(pool, 0, p_.N * p_.H, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) {
                                Work work(p_);
                                for (int64_t i = begin; i < end; i++)
                                  input_row(i / p_.H, i % p_.H, &work);
                              });
  }

 private:
  // An output pixel that dx's pixel receives from.
  struct Source {
    int64_t offset;  // of its channel 0
    int64_t code;    // what it selected if it selected this pixel
    Lane divisor;
  };
  struct Work {
    explicit Work(const PoolProblem& p) {
      if (!kAverage) return;
      for (int64_t q = 0; q < p.Q; q++)
        factors.push_back(horizontal_factor(p, horizontal_axis(p), q));
    }
    std::vector<Contribution> windows;
    std::vector<Source> sources;
    std::vector<int64_t> factors;
  };

  void input_row(int64_t n, int64_t h, Work* work) const {
    work->windows.clear();
    append_contributions(vertical_, h, 0, p_.P, &work->windows);
    for (int64_t w = 0; w < p_.W; w++) {
      work->sources.clear();
      bool one_divisor = true;
      for (const Contribution& row : work->windows) {
        const int64_t factor = kAverage ? vertical_factor(p_, vertical_, row.output) : 0;
        for (size_t i = first_[w]; i < first_[w + 1]; i++) {
          const Contribution& column = columns_[i];
          Source source;
          source.offset = ((n * p_.P + row.output) * p_.Q + column.output) * p_.C;
          source.code = sizeof_code() == 8 ? h * p_.W + w : row.tap * p_.S + column.tap;
          source.divisor = Lane{1};
          if (kAverage) {
            source.divisor = static_cast<Lane>(factor * work->factors[column.output]);
            one_divisor = one_divisor && (work->sources.empty() ||
                                          work->sources.front().divisor == source.divisor);
          }
          work->sources.push_back(source);
        }
      }
      channels(work->sources, one_divisor, dx_ + ((n * p_.H + h) * p_.W + w) * p_.C);
    }
  }

  static constexpr size_t sizeof_code() {
    if constexpr (kAverage) {
      return 0;
    } else {
      return sizeof(O);
    }
  }

  void channels(const std::vector<Source>& sources, bool one_divisor, T* pixel) const {
    int64_t c = 0;
    for (; c + 4 * kLanes <= p_.C; c += 4 * kLanes)
      gather<4, false>(sources, one_divisor, c, kLanes, pixel);
    for (; c + kLanes <= p_.C; c += kLanes)
      gather<1, false>(sources, one_divisor, c, kLanes, pixel);
    if (c < p_.C) gather<1, true>(sources, one_divisor, c, p_.C - c, pixel);
  }

  template <int kVectors, bool kPartial>
  TORCHCONV_INLINE void gather(const std::vector<Source>& sources, bool one_divisor, int64_t c,
                               int64_t n, T* pixel) const {
    V sum[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) sum[i] = V{};
    for (const Source& source : sources) {
      const int64_t from = source.offset + c;
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) {
        const T* at = dy_ + from + i * kLanes;
        V v = kPartial ? W::load_partial(at, n) : W::load(at);
        if constexpr (kAverage) {
          if (!one_divisor) v /= source.divisor;
          sum[i] += v;
        } else {
          const C equal = matches<kPartial>(selected_ + from + i * kLanes, source.code, n);
          sum[i] += equal ? v : V{};
        }
      }
    }
    const Lane divisor = sources.empty() ? Lane{1} : sources.front().divisor;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      if (kAverage && one_divisor) sum[i] /= divisor;
      T* to = pixel + c + i * kLanes;
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
  std::vector<Contribution> columns_;  // those of column w are [first_[w], first_[w + 1])
  std::vector<size_t> first_;
};

}  // namespace torchconv::cpu
