// Cuts a range of equal work items for the threads: how finely follows from the work alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>

#include "core/parallel.h"
#include "core/range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Items that are worth some 20 us, below which waking a thread costs more than it gains: at least
// one. operations: multiply-adds, or elements moved, in one item. A small problem runs below the
// peak.
inline int64_t work_grain(double operations) {
  constexpr double kOperationsIn20us = 12.5e3 * kVectorBytes;
  const double wanted = kOperationsIn20us / std::max(operations, 1.0);
  return std::max<int64_t>(1, wanted < 1e15 ? static_cast<int64_t>(wanted) : int64_t{1} << 50);
}

// The packing of a weight takes the time of so many multiply-adds.
constexpr double kPackingOperations = 12;

// parallel_for for a body that allocates scratch memory: failing to get it is reported here.
template <typename F>
void parallel_for_with_scratch(const Parallel& pool, int64_t begin, int64_t end, int64_t grain,
                               F&& f) {
  std::atomic<bool> failed{false};
  parallel_for(pool, begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      f(b, e);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

// Items go to threads in runs of at least work_grain, and in at most kMaxSlots runs, so that
// scratch for each of them can be allocated before the threads start.
struct WorkSplit {
  static constexpr int64_t kMaxSlots = 64;
  int64_t items, grain, slots;

  // operations: see work_grain.
  WorkSplit(int64_t item_count, double operations) : items(std::max<int64_t>(item_count, 0)) {
    const int64_t runs = std::min(items / work_grain(operations), kMaxSlots);
    grain = ceil_div(std::max<int64_t>(items, 1), std::max<int64_t>(runs, 1));
    slots = std::max<int64_t>(1, ceil_div(items, grain));
  }

  // f(begin, end, slot): no two concurrent calls have the same slot, and 0 <= slot < slots. f may
  // fail to get memory.
  template <typename F>
  void run(const Parallel& pool, F&& f) const {
    if (items == 0) return;
    if (slots == 1) return f(int64_t{0}, items, int64_t{0});
    // The pool deals out whole runs: it may cut a range below a grain above 1.
    parallel_for_with_scratch(pool, 0, slots, 1, [&](int64_t first, int64_t last) {
      f(first * grain, std::min(last * grain, items), first);
    });
  }
};

}  // namespace torchconv::cpu
