// Pooling's backward in gather form: which windows an input element belongs to.
//
// Element e of an axis receives from output o through tap t where o * stride - pad + t * dilation =
// e. Every kernel visits those outputs in ascending order, the order in which a scatter over the
// outputs adds: the result has the same bits for every kernel and every number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/pool_window.h"

namespace torchconv::cpu {

struct Contribution {
  int64_t tap, output;
};

// Outputs from the first to the last that one element receives from, at most.
int64_t outputs_spanned(const Axis& axis);

// The contributions to every element of an axis.
class Contributions {
 public:
  explicit Contributions(const Axis& axis);
  const Contribution* begin(int64_t e) const { return list_.data() + first_[index(e)]; }
  const Contribution* end(int64_t e) const { return list_.data() + first_[index(e) + 1]; }
  int64_t count(int64_t e) const { return end(e) - begin(e); }
  bool same_outputs(int64_t a, int64_t b) const {
    const int64_t n = count(a);
    return n == count(b) && (n == 0 || (begin(a)->output == begin(b)->output &&
                                        (end(a) - 1)->output == (end(b) - 1)->output));
  }

 private:
  static size_t index(int64_t e) { return static_cast<size_t>(e); }
  std::vector<Contribution> list_;
  std::vector<size_t> first_;  // of element e: list_[first_[e]] up to list_[first_[e + 1]]
};

// The contributions to columns i * stride + phase, for all i at once: from output i + shift.
struct Phases {
  explicit Phases(const Axis& axis);
  const Contribution* begin(size_t phase) const { return taps.data() + first[phase]; }
  const Contribution* end(size_t phase) const { return taps.data() + first[phase + 1]; }

  std::vector<Contribution> taps;  // output holds the shift
  std::vector<size_t> first;
  int64_t columns;              // i < columns
  int64_t left = 0, right = 0;  // how far i + shift reaches past either end of the outputs
};

}  // namespace torchconv::cpu
