// The geometry of pooling windows along one axis, and what the pooling kernels share around it:
// which taps of a window lie in the image, which outputs have only such taps, how reduced rows are
// kept for the next output row, how much work is worth a thread.
//
// Nothing here multiplies a tap by the dilation before knowing that the product lies in the image,
// so no kernel size, padding or dilation can overflow into a wrong address.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/parallel.h"
#include "core/pool_problem.h"
#include "core/range.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {

// Output o's tap t reads element o * stride - pad + t * dilation.
struct Axis {
  int64_t size, out, taps, stride, pad, dilation;

  int64_t start(int64_t o) const { return o * stride - pad; }

  Range valid_taps(int64_t o) const {
    const int64_t first = start(o);
    if (size <= 0 || first >= size) return {0, 0};
    const int64_t begin = first >= 0 ? 0 : ceil_div(-first, dilation);
    const int64_t end = std::min(taps, (size - 1 - first) / dilation + 1);
    return {std::min(begin, end), end};
  }

  // Outputs whose taps all lie in the image.
  Range interior() const {
    if (size <= 0 || taps - 1 > (size - 1) / dilation) return {0, 0};
    const int64_t last_start = size - 1 - (taps - 1) * dilation;
    const int64_t begin = std::min(ceil_div(pad, stride), out);
    const int64_t end = std::min(floor_div(last_start + pad, stride) + 1, out);
    return {begin, std::max(begin, end)};
  }

  // Elements from a window's first tap to its last, no more than the image has.
  int64_t span() const {
    if (size <= 0) return 0;
    return taps - 1 > (size - 1) / dilation ? size : (taps - 1) * dilation + 1;
  }
};

inline Axis vertical_axis(const PoolProblem& p) {
  return {p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h};
}
inline Axis horizontal_axis(const PoolProblem& p) {
  return {p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w};
}

// With one channel, or one pixel, both layouts are the same memory: take the better kernel.
inline bool runs_channels_last(const PoolProblem& p) {
  return p.layout == Layout::kNHWC && p.C != 1;
}

// Rows already reduced, kept for the output rows that need them again: row i stands in slot
// i modulo a power of two. Where windows share no rows or the rows are too large to stay in cache,
// each is reduced when it is needed.
class RowRing {
 public:
  static constexpr int64_t kMaxBytes = 512 * 1024;

  // A window spans `span` rows and the next one begins `step` rows further.
  static int64_t slots_to_keep(int64_t span, int64_t step, int64_t row_bytes) {
    int64_t slots = 1;
    while (slots < span) slots *= 2;
    return step < span && slots <= kMaxBytes / std::max<int64_t>(row_bytes, 1) ? slots : 0;
  }

  explicit RowRing(int64_t slots) : rows_(static_cast<size_t>(slots), -1) {}
  bool keeps() const { return !rows_.empty(); }
  void clear() { std::fill(rows_.begin(), rows_.end(), -1); }
  int64_t slot(int64_t row) const { return row & (static_cast<int64_t>(rows_.size()) - 1); }
  // True where the caller has to fill the row's slot.
  bool claim(int64_t row) {
    int64_t& held = rows_[static_cast<size_t>(slot(row))];
    const bool missing = held != row;
    held = row;
    return missing;
  }

 private:
  std::vector<int64_t> rows_;
};

// Items per task such that a task is worth waking a thread for: about 15 us at 10 GB/s.
inline int64_t pool_grain(int64_t bytes_per_item) {
  return std::max<int64_t>(1, 150000 / std::max<int64_t>(bytes_per_item, 1));
}

}  // namespace torchconv::cpu
