// Pooling's backward in gather form: which windows an input element belongs to.
//
// Element e of an axis receives from output o through tap t where o * stride - pad + t * dilation =
// e. Every kernel visits those outputs in ascending order, the order in which a scatter over the
// outputs adds, and writes each element of dx once: no zero-fill, no atomics, one result for any
// number of threads.
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

// The contributions to columns i * stride + phase, for all i at once: from output i + shift.
struct Phase {
  std::vector<Contribution> taps;  // output holds the shift
};

struct Phases {
  explicit Phases(const Axis& axis) : columns(ceil_div(axis.size, axis.stride)) {
    const int64_t count = std::min(axis.stride, axis.size);
    phases.resize(static_cast<size_t>(count));
    for (int64_t phase = 0; phase < count; phase++) {
      // A shift matters where i + shift is an output for some i.
      std::vector<Contribution>* taps = &phases[static_cast<size_t>(phase)].taps;
      append_contributions(axis, phase, 1 - columns, columns - 1 + axis.out, taps);
      for (const Contribution& t : *taps) {
        left = std::max(left, -t.output);
        right = std::max(right, columns - 1 + t.output - (axis.out - 1));
      }
    }
  }

  std::vector<Phase> phases;
  int64_t columns;              // i < columns
  int64_t left = 0, right = 0;  // how far i + shift reaches past either end of the outputs
};

}  // namespace torchconv::cpu
