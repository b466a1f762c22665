// Long sums of float arrays: what rounding loses of each addition is added up beside the total
// (Knuth's two-sum), so that the error does not grow with the number of addends.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

// Adds n elements, whole vectors, to totals[2*n], which the first call of a sum overwrites; the
// last call replaces the addends by their sum.
template <typename A>
void add_compensated(A* addends, int64_t n, bool first, bool last, A* totals) {
  using V = Vec<A>;
  for (int64_t i = 0; i < n; i += V::kLanes, totals += 2 * V::kLanes) {
    const auto x = V::load(addends + i);
    const auto sum = first ? typename V::Type{} : V::load(totals);
    const auto lost = first ? typename V::Type{} : V::load(totals + V::kLanes);
    const auto total = sum + x, part = total - sum;
    const auto error = lost + ((sum - (total - part)) + (x - part));
    V::store(totals, total);
    V::store(totals + V::kLanes, error);
    if (last) V::store(addends + i, total + error);
  }
}

}  // namespace torchconv::cpu
