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

// The outputs that element receives from, of the outputs [first, first + count).
inline void append_contributions(const Axis& axis, int64_t element, int64_t first, int64_t count,
                                 std::vector<Contribution>* list) {
  if (count <= 0) return;
  const int64_t position = element + axis.pad;
  const int64_t last = first + count - 1;
  int64_t tap = floor_div(position - first * axis.stride, axis.dilation);
  tap = std::min(tap, axis.taps - 1);
  if (tap >= count) {  // a huge window: fewer outputs than taps
    for (int64_t output = first; output <= last; output++) {
      const int64_t distance = position - output * axis.stride;
      if (distance < 0) break;
      if (distance % axis.dilation != 0 || distance / axis.dilation >= axis.taps) continue;
      list->push_back({distance / axis.dilation, output});
    }
    return;
  }
  for (; tap >= 0; tap--) {
    const int64_t distance = position - tap * axis.dilation;
    const int64_t output = floor_div(distance, axis.stride);
    if (output > last) break;
    if (output * axis.stride == distance) list->push_back({tap, output});
  }
}

// Outputs from the first to the last that one element receives from, at most.
inline int64_t outputs_spanned(const Axis& axis) {
  if (axis.taps - 1 > axis.out * axis.stride / axis.dilation) return axis.out;
  return std::min(axis.out, (axis.taps - 1) * axis.dilation / axis.stride + 1);
}

// The contributions to every element of an axis.
class Contributions {
 public:
  explicit Contributions(const Axis& axis) {
    first_.reserve(static_cast<size_t>(axis.size) + 1);
    first_.push_back(0);
    for (int64_t e = 0; e < axis.size; e++) {
      append_contributions(axis, e, 0, axis.out, &list_);
      first_.push_back(list_.size());
    }
  }
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
  explicit Phases(const Axis& axis) : columns(ceil_div(axis.size, axis.stride)) {
    const int64_t count = std::min(axis.stride, axis.size);
    for (int64_t phase = 0; phase < count; phase++) {
      // A shift matters where i + shift is an output for some i.
      first.push_back(taps.size());
      append_contributions(axis, phase, 1 - columns, columns - 1 + axis.out, &taps);
    }
    first.push_back(taps.size());
    for (const Contribution& t : taps) {
      left = std::max(left, -t.output);
      right = std::max(right, columns + t.output - axis.out);
    }
  }
  const Contribution* begin(size_t phase) const { return taps.data() + first[phase]; }
  const Contribution* end(size_t phase) const { return taps.data() + first[phase + 1]; }

  std::vector<Contribution> taps;  // output holds the shift
  std::vector<size_t> first;
  int64_t columns;              // i < columns
  int64_t left = 0, right = 0;  // how far i + shift reaches past either end of the outputs
};

}  // namespace torchconv::cpu
