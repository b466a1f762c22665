// Cuts a range of equal work items for the threads: how finely follows from the work alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/parallel.h"
#include "core/range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Items that are worth some 8 us: at least one. Between the layers of a network the threads are
// awake, and handing one work costs a small part of that. operations: multiply-adds, or elements
// moved, in one item. A small problem runs below the peak.
inline int64_t work_grain(double operations) {
  constexpr double kOperationsIn8us = 5e3 * kVectorBytes;
  const double wanted = kOperationsIn8us / std::max(operations, 1.0);
  return std::max<int64_t>(1, wanted < 1e15 ? static_cast<int64_t>(wanted) : int64_t{1} << 50);
}

// The packing of a weight takes the time of so many multiply-adds.
constexpr double kPackingOperations = 12;

// parallel_for for a body that allocates scratch memory: failing to get it is reported here. The
// body is called through a pointer, so that what catches the failure is compiled once.
void parallel_for_with_scratch(const Parallel& pool, int64_t begin, int64_t end, int64_t grain,
                               Parallel::Body body, void* context);

template <typename F>
void parallel_for_with_scratch(const Parallel& pool, int64_t begin, int64_t end, int64_t grain,
                               F&& f) {
  using Callable = std::remove_reference_t<F>;
  parallel_for_with_scratch(
      pool, begin, end, grain,
      [](int64_t b, int64_t e, void* context) { (*static_cast<Callable*>(context))(b, e); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Items go to threads in even runs of at least work_grain, and in at most kMaxSlots runs, so that
// scratch for each of them can be allocated before the threads start. There are as many for each of
// two or four threads.
struct WorkSplit {
  static constexpr int64_t kMaxSlots = 64;
  int64_t items, slots;

  // operations: see work_grain.
  WorkSplit(int64_t item_count, double operations) : items(std::max<int64_t>(item_count, 0)) {
    slots = std::max<int64_t>(1, std::min(items / work_grain(operations), kMaxSlots));
    if (slots > 1) slots -= slots % (slots < 8 ? 2 : 4);
  }

  // Where the slot's items begin, which is where those of the slot before it end.
  int64_t begin(int64_t slot) const { return slot * items / slots; }

  // f(begin, end, slot): no two concurrent calls have the same slot, and 0 <= slot < slots. f may
  // fail to get memory.
  template <typename F>
  void run(const Parallel& pool, F&& f) const {
    using Callable = std::remove_reference_t<F>;
    run_body(
        pool,
        [](int64_t first, int64_t last, int64_t slot, void* context) {
          (*static_cast<Callable*>(context))(first, last, slot);
        },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  using Body = void (*)(int64_t begin, int64_t end, int64_t slot, void* context);
  void run_body(const Parallel& pool, Body body, void* context) const;
};

}  // namespace torchconv::cpu
