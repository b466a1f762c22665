// A loop over threads that need scratch memory: an exception must not leave a thread's body, so
// that memory could not be had is noted, and thrown where the loop was called.
#include "cpu/parallel_range.h"

#include <atomic>
#include <new>

namespace torchconv::cpu {

void parallel_for_with_scratch(const Parallel& pool, int64_t begin, int64_t end, int64_t grain,
                               Parallel::Body body, void* context) {
  std::atomic<bool> failed{false};
  parallel_for(pool, begin, end, grain, [&](int64_t b, int64_t e) {
    try {
      body(b, e, context);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  });
  if (failed) throw std::bad_alloc();
}

}  // namespace torchconv::cpu
