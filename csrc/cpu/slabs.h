// Slabs: the parts into which a long reduction is cut for the threads. How many follows from the
// shape alone, and their sums are added in order.
#pragma once

#include <cstdint>

namespace torchconv::cpu {

// As many slabs or less, so that they can be dealt evenly to a few threads.
inline int64_t even_slabs(int64_t slabs) {
  return slabs > 4 ? slabs / 4 * 4 : slabs == 3 ? 2 : slabs;
}

// Operations (work_grain) that adding an element which another thread wrote is worth.
inline constexpr double kFarAddition = 8;

}  // namespace torchconv::cpu
