// Average pooling's backward, both layouts: the output rows that an input row receives from are
// divided and summed into one row between zero margins; the input row is the sum of that row's
// shifted copies, and equal to the row before it where the same outputs reach both.
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
      : p_(p), dy_(dy), dx_(dx), g_(p, sizeof(T)) {
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
                              [&](int64_t begin, int64_t end) { rows(begin, end); });
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
      if (!same) sum_outputs(dy_ + plane * p_.P * g_.out_row, h, sum);
      if (same && !g_.streams) {
        std::copy_n(row - g_.in_row, g_.in_row, row);
      } else {
        write_row(g_, sums, line.get(), row);
      }
    }
    if (g_.streams) stream_fence();
  }

  // Row h's outputs in ascending order, each over its divisor.
  void sum_outputs(const T* plane, int64_t h, Lane* sum) const {
    const Contribution* const begin = g_.windows.begin(h);
    const Contribution* const end = g_.windows.end(h);
    int64_t j = 0;
    for (; j + kLanes <= g_.out_row; j += kLanes) {
      const auto columns = Values::load(column_factors_.data() + j);
      typename W::Type total{};
      for (const Contribution* w = begin; w != end; w++)
        total += W::load(plane + w->output * g_.out_row + j) / (columns * factor(*w));
      Values::store(sum + j, total);
    }
    for (; j < g_.out_row; j++) {
      Lane total = 0;
      for (const Contribution* w = begin; w != end; w++) {
        total += to_wide<T>(plane[w->output * g_.out_row + j]) /
                 (column_factors_[static_cast<size_t>(j)] * factor(*w));
      }
      sum[j] = total;
    }
  }

  Lane factor(const Contribution& window) const {
    return row_factors_[static_cast<size_t>(window.output)];
  }

  const PoolProblem& p_;
  const T* dy_;
  T* dx_;
  RowGeometry g_;
  std::vector<Lane> row_factors_;     // of the divisors, by output row
  std::vector<Lane> column_factors_;  // by element of an output row
  std::vector<int64_t> shifts_;       // g_.phases' taps in elements
};

}  // namespace torchconv::cpu
