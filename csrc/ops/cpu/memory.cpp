// The memory pool as C functions, which torchconv/memory.py calls through ctypes: they take no
// tensor, so the dispatcher has nothing to dispatch on.

#include <cstdint>

#include "core/memory_pool.h"

#define TORCHCONV_EXPORT extern "C" __attribute__((visibility("default")))

using torchconv::memory_pool::Stats;

// The fields of Stats in their order.
TORCHCONV_EXPORT void torchconv_memory_stats(int64_t* fields) {
  const Stats s = torchconv::memory_pool::stats();
  const int64_t values[] = {s.enabled, s.limit,  s.allocated, s.cached,
                            s.peak,    s.reused, s.fresh,     s.returned};
  static_assert(sizeof(values) == sizeof(Stats), "one value for each field");
  for (const int64_t value : values) *fields++ = value;
}

TORCHCONV_EXPORT void torchconv_memory_configure(bool enabled, int64_t limit) {
  torchconv::memory_pool::configure(enabled, limit);
}

TORCHCONV_EXPORT void torchconv_empty_cache() { torchconv::memory_pool::empty_cache(); }
