// Average pooling's divisors, PyTorch's rule, shared by forward and backward.
//
// A window's divisor is the product of one factor per axis: how many positions it spans before
// (count_include_pad) or after it is clipped to the image, where "before" still ends at the
// padding's end, so what ceil_mode adds never counts. divisor_override replaces the product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/pool_problem.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// The factor of output o; 1 for a window outside the image, whose sum is 0. An override is the
// horizontal factor, the vertical one is then 1.
int64_t vertical_factor(const PoolProblem& p, const Axis& axis, int64_t o);
int64_t horizontal_factor(const PoolProblem& p, const Axis& axis, int64_t o);
// Of every output row.
std::vector<int64_t> vertical_factors(const PoolProblem& p, const Axis& axis);

// Divisors of the outputs of one row, of `lanes` >= Q elements.
template <typename Lane>
class DivisorRow {
 public:
  DivisorRow(const PoolProblem& p, const Axis& vertical, const Axis& horizontal, int64_t lanes)
      : row_factors_(vertical_factors(p, vertical)),
        factors_(static_cast<size_t>(lanes), 1),
        row_(static_cast<size_t>(lanes), Lane{1}) {
    for (int64_t q = 0; q < p.Q; q++)
      factors_[static_cast<size_t>(q)] = horizontal_factor(p, horizontal, q);
  }

  // Divisors of output row out_p; valid until the next call.
  const Lane* at(int64_t out_p) {
    const int64_t factor = row_factors_[static_cast<size_t>(out_p)];
    if (factor != factor_) {
      factor_ = factor;
      for (size_t q = 0; q < row_.size(); q++) row_[q] = static_cast<Lane>(factor * factors_[q]);
    }
    return row_.data();
  }

 private:
  std::vector<int64_t> row_factors_, factors_;
  std::vector<Lane> row_;
  int64_t factor_ = 0;  // of the row held; none is 0
};

// In the place of DivisorRow where nothing is divided.
struct NoDivisors {
  NoDivisors(const PoolProblem&, const Axis&, const Axis&, int64_t) {}
  std::nullptr_t at(int64_t) const { return nullptr; }
};

}  // namespace torchconv::cpu
