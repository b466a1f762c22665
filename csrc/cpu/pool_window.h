// The geometry of pooling windows along one axis, and what the pooling kernels share around it:
// which taps of a window lie in the image, which outputs have only such taps, how reduced rows are
// kept for the next output row, how much work is worth a thread.
//
// Nothing here multiplies a tap by the dilation before knowing that the product lies in the image,
// so no kernel size, padding or dilation can overflow into a wrong address. What is called once a
// call, or once a row, is in pool2d_geometry.cpp, so that the kernels, which have many instances,
// do not each compile it.
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

  // The taps of output o that lie in the image.
  Range valid_taps(int64_t o) const;
  // The same of every output.
  std::vector<Range> all_valid_taps() const;
  std::vector<int64_t> outputs_without_taps() const;

  // Outputs whose taps all lie in the image.
  Range interior() const;

  // Elements from a window's first tap to its last, no more than the image has.
  int64_t span() const;
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
  static int64_t slots_to_keep(int64_t span, int64_t step, int64_t row_bytes);

  explicit RowRing(int64_t slots);
  bool keeps() const { return !rows_.empty(); }
  void clear();
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
