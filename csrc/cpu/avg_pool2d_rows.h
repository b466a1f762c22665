// Average pooling's backward, both layouts: the output rows that an input row receives from are
// divided and summed into one row between zero margins; the input row is the sum of that row's
// shifted copies, and equal to the row before it where the same outputs reach both. Planes by
// strides above 2 along W, where each element is written by itself, are spread along W first, each
// output row once and not for every input row that it reaches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/buffer.h"
#include "cpu/avg_pool2d.h"
#include "cpu/pool2d_backward_rows.h"

namespace torchconv::cpu {

template <typename T>
class AverageRows {
  using W = WideVec<T>;
  using Lane = Wide<T>;
  using Values = Vec<Lane>;
  static constexpr int kLanes = W::kLanes;

 public:
  AverageRows(const PoolProblem& p, const T* dy, T* dx)
      : p_(p),
        dy_(dy),
        dx_(dx),
        g_(p, sizeof(T)),
        spreads_(g_.channels == 1 && p.stride_w > 2),
        spread_row_(round_up(p.W, kLanes)) {
    for (int64_t out_p = 0; out_p < p.P; out_p++)
      row_factors_.push_back(static_cast<Lane>(vertical_factor(p, g_.vertical, out_p)));
    for (int64_t q = 0; q < p.Q; q++) {
      const Lane factor = static_cast<Lane>(horizontal_factor(p, g_.horizontal, q));
      column_factors_.insert(column_factors_.end(), static_cast<size_t>(g_.channels), factor);
    }
    for (size_t phase = 0; phase + 1 < g_.phases.first.size(); phase++) {
      for (const Contribution* t = g_.phases.begin(phase); t != g_.phases.end(phase); t++)
        shifts_.push_back(t->output * g_.channels);
    }
  }

  void run(const Parallel& pool) const {
    const int64_t row_bytes = g_.in_row * static_cast<int64_t>(sizeof(T)) * 4;
    parallel_for_with_scratch(pool, 0, g_.planes * p_.H, pool_grain(row_bytes),
                              [&](int64_t begin, int64_t end) {
                                spreads_ ? spread_rows(begin, end) : rows(begin, end);
                                if (g_.streams) stream_fence();
                              });
  }

 private:
  struct Sums {
    const Lane* row;  // the output rows' sum
    const int64_t* shifts;
    const size_t* first;  // of phase f: shifts[first[f]] up to shifts[first[f + 1]]

    template <int n>
    TORCHCONV_INLINE void add(size_t phase, int64_t j, typename W::Type* sum) const {
      const int64_t* const end = shifts + first[phase + 1];
      for (const int64_t* shift = shifts + first[phase]; shift != end; shift++) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) sum[i] += Values::load(row + *shift + j + i * kLanes);
      }
    }
    Lane one(size_t phase, int64_t j) const {
      Lane sum = 0;
      for (size_t i = first[phase]; i < first[phase + 1]; i++) sum += row[shifts[i] + j];
      return sum;
    }
  };

  // Input rows [begin, end) of the planes * H.
  void rows(int64_t begin, int64_t end) const {
    const int64_t lanes = g_.left + g_.reach(kLanes);
    const Buffer<Lane> scratch(lanes);
    std::fill_n(scratch.get(), lanes, Lane{0});
    Lane* sum = scratch.get() + g_.left;
    const Buffer<T> line(g_.line_size(kLanes));
    const Sums sums{sum, shifts_.data(), g_.phases.first.data()};
    for (int64_t i = begin; i < end; i++) {
      const int64_t plane = i / p_.H, h = i % p_.H;
      T* row = dx_ + i * g_.in_row;
      const bool same = i > begin && h > 0 && g_.windows.same_outputs(h, h - 1);
      if (!same)
        sum_outputs(dy_ + plane * p_.P * g_.out_row, g_.windows.begin(h), g_.windows.end(h), sum);
      if (same && !g_.streams) {
        std::copy_n(row - g_.in_row, g_.in_row, row);
      } else {
        write_row(g_, sums, line.get(), row);
      }
    }
  }

  // The outputs of windows [begin, end) in ascending order, each over its divisor.
  void sum_outputs(const T* plane, const Contribution* begin, const Contribution* end,
                   Lane* sum) const {
    int64_t j = 0;
    for (; j + kLanes <= g_.out_row; j += kLanes) {
      const auto columns = Values::load(column_factors_.data() + j);
      typename W::Type total{};
      for (const Contribution* w = begin; w != end; w++)
        total += W::load(plane + w->output * g_.out_row + j) / (columns * factor(*w));
      Values::store(sum + j, total);
    }
    if (j == g_.out_row) return;
    const int64_t n = g_.out_row - j;
    const auto columns = Values::load_partial(column_factors_.data() + j, n);
    typename W::Type total{};
    for (const Contribution* w = begin; w != end; w++)
      total += W::load_partial(plane + w->output * g_.out_row + j, n) / (columns * factor(*w));
    Values::store_partial(sum + j, total, n);
  }

  // ---- Along W first.

  // Input rows [begin, end) of the planes * H.
  void spread_rows(int64_t begin, int64_t end) const {
    const int64_t lanes = g_.left + g_.reach(kLanes), most = outputs_spanned(g_.vertical);
    const Buffer<Lane> scratch(lanes);
    std::fill_n(scratch.get(), lanes, Lane{0});
    int64_t slots = 1;
    while (slots < most) slots *= 2;
    RowRing ring(slots);
    const Buffer<Lane> lines(slots * spread_row_);
    for (int64_t i = begin; i < end; i++) {
      const int64_t plane = i / p_.H, h = i % p_.H;
      for (const Contribution* w = g_.windows.begin(h); w != g_.windows.end(h); w++) {
        const int64_t output = plane * p_.P + w->output;
        if (!ring.claim(output)) continue;
        sum_outputs(dy_ + plane * p_.P * g_.out_row, w, w + 1, scratch.get() + g_.left);
        spread(scratch.get() + g_.left, lines.get() + ring.slot(output) * spread_row_);
      }
      write_sum(plane, h, ring, lines.get(), dx_ + i * p_.W);
    }
  }

  // An output row's part of every column.
  void spread(const Lane* row, Lane* to) const {
    for (size_t phase = 0; phase + 1 < g_.phases.first.size(); phase++) {
      const int64_t* const begin = shifts_.data() + g_.phases.first[phase];
      const int64_t* const end = shifts_.data() + g_.phases.first[phase + 1];
      const Lane* from = row;
      for (int64_t w = static_cast<int64_t>(phase); w < p_.W; w += p_.stride_w, from++) {
        Lane sum = 0;
        for (const int64_t* shift = begin; shift != end; shift++) sum += from[*shift];
        to[w] = sum;
      }
    }
  }

  void write_sum(int64_t plane, int64_t h, const RowRing& ring, const Lane* lines, T* row) const {
    const bool streams = g_.streams && W::streamable(row);
    for (int64_t j = 0; j < p_.W; j += kLanes) {
      typename W::Type sum{};
      for (const Contribution* w = g_.windows.begin(h); w != g_.windows.end(h); w++)
        sum += Values::load(lines + ring.slot(plane * p_.P + w->output) * spread_row_ + j);
      if (j + kLanes <= p_.W) {
        W::store(row + j, sum, streams);
      } else {
        W::store_partial(row + j, sum, p_.W - j);
      }
    }
  }

  Lane factor(const Contribution& window) const {
    return row_factors_[static_cast<size_t>(window.output)];
  }

  const PoolProblem& p_;
  const T* dy_;
  T* dx_;
  RowGeometry g_;
  bool spreads_;                      // along W first
  int64_t spread_row_;                // elements of such a row, with room for a vector
  std::vector<Lane> row_factors_;     // of the divisors, by output row
  std::vector<Lane> column_factors_;  // by element of an output row
  std::vector<int64_t> shifts_;       // g_.phases' taps in elements
};

}  // namespace torchconv::cpu
