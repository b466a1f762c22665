// Memory that is kept: blocks of a megabyte and more for outputs and scratch.
//
// The first touch of a page costs more than all the work that a pooling or 1x1 layer does on it,
// and the C library returns every large block to the system when it is freed. So large blocks come
// from the system in huge pages, and freed ones are kept, up to a limit, for the next request of
// about the same size. Thread-safe; a forked child goes on with its own copy. Never given back at
// exit, because tensors may outlive every static object.
#pragma once

#include <cstdint>

namespace torchconv::memory_pool {

// Smaller requests are the C library's business.
inline constexpr int64_t kSmallest = int64_t{1} << 20;

// A block of at least `bytes`, 64-byte aligned or better and not initialised; null where the pool
// is off, the request is smaller than kSmallest or the system has no memory.
void* allocate(int64_t bytes);

// Takes back a block of allocate's, whether the pool is still on or not.
void release(void* block);

// Off: nothing is kept, and allocate returns null. limit: the most bytes kept while nobody uses
// them. Both give back at once what may no longer be kept.
void configure(bool enabled, int64_t limit);

// Gives back every block that nobody uses.
void empty_cache();

struct Stats {
  int64_t enabled, limit;
  int64_t allocated, cached;  // bytes in blocks in use, and kept
  int64_t peak;               // most bytes in use at once
  int64_t reused, fresh;      // requests served by a kept block, and by the system
  int64_t returned;           // blocks given back to the system
};
Stats stats();

}  // namespace torchconv::memory_pool
