// See memory_pool.h. Blocks are rounded up to whole huge pages and, above 16 of them, to an eighth
// of their power of two, so a request and a kept block of nearly its size meet; a block up to an
// eighth larger also serves. What is kept beyond the limit goes back oldest first.
#include "core/memory_pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <unordered_map>

#include "core/fork_safe.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace torchconv::memory_pool {
namespace {

// For AddressSanitizer, which knows nothing of this memory: only the bytes asked for may be used.
void allow_access([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes,
                  [[maybe_unused]] int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(data, static_cast<size_t>(bytes));
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) + bytes, static_cast<size_t>(size - bytes));
#endif
}

constexpr int64_t kHugePage = int64_t{2} << 20;

// Of the machine, or what a container lets its processes have, in version 2 or 1 of cgroups.
int64_t memory_of_machine() {
  int64_t bytes = static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  for (const char* path :
       {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    FILE* const file = std::fopen(path, "r");
    if (file == nullptr) continue;
    long long limit = 0;  // which stays, where the file says "max"
    if (std::fscanf(file, "%lld", &limit) == 1 && limit > 0)
      bytes = std::min<int64_t>(bytes, limit);
    std::fclose(file);
  }
  return bytes;
}

// An eighth of the memory, but where that is less than a gibibyte, this or half of the memory.
int64_t default_limit() {
  const int64_t memory = memory_of_machine();
  return std::max(memory / 8, std::min(int64_t{1} << 30, memory / 2));
}

int64_t rounded(int64_t bytes) {
  int64_t unit = kHugePage;
  while (unit * 16 < bytes) unit *= 2;
  return (bytes + unit - 1) / unit * unit;
}

// Pages from the system, aligned to huge pages; null where it has none.
void* map_pages(int64_t size) {
  const size_t padded = static_cast<size_t>(size + kHugePage);
  void* mapped = mmap(nullptr, padded, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const uintptr_t misaligned = reinterpret_cast<uintptr_t>(begin) % kHugePage;
  char* const block = misaligned == 0 ? begin : begin + (kHugePage - misaligned);
  if (block != begin) munmap(begin, static_cast<size_t>(block - begin));
  char* const end = begin + padded;
  char* const block_end = block + size;
  if (block_end != end) munmap(block_end, static_cast<size_t>(end - block_end));
#ifdef MADV_HUGEPAGE
  madvise(block, static_cast<size_t>(size), MADV_HUGEPAGE);  // a wish: refusing it is no error
#endif
  return block;
}

struct Block {
  void* data;
  int64_t size;
};

class Pool : public ForkSafe<Pool> {
 public:
  Pool() {
    const char* const on = std::getenv("TORCHCONV_MEMORY_POOL");
    const char* const limit = std::getenv("TORCHCONV_MEMORY_POOL_LIMIT");
    stats_.enabled = on == nullptr || std::strcmp(on, "0") != 0;
    stats_.limit = limit == nullptr ? default_limit() : std::max(std::atoll(limit), 0LL);
  }

  void* allocate(int64_t bytes) {
    if (bytes < kSmallest || bytes > INT64_MAX / 4) return nullptr;
    const int64_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex);
    if (!stats_.enabled) return nullptr;
    Block block = take_kept(size);
    if (block.data != nullptr) {
      stats_.reused++;
    } else {
      block = {map_pages(size), size};
      if (block.data == nullptr) {
        trim(0);
        block.data = map_pages(size);
      }
      if (block.data == nullptr) return nullptr;
      stats_.fresh++;
    }
    used_.emplace(block.data, block.size);
    allow_access(block.data, bytes, block.size);
    stats_.allocated += block.size;
    stats_.peak = std::max(stats_.peak, stats_.allocated);
    return block.data;
  }

  void release(void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = used_.find(data);
    if (found == used_.end()) return;
    const Block block{data, found->second};
    used_.erase(found);
    stats_.allocated -= block.size;
    allow_access(block.data, 0, block.size);
    kept_.push_front(block);
    stats_.cached += block.size;
    trim(stats_.enabled ? stats_.limit : 0);
  }

  void configure(bool enabled, int64_t limit) {
    const std::lock_guard<std::mutex> lock(mutex);
    stats_.enabled = enabled;
    stats_.limit = std::max<int64_t>(limit, 0);
    trim(enabled ? stats_.limit : 0);
  }

  void empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex);
    trim(0);
  }

  Stats stats() {
    const std::lock_guard<std::mutex> lock(mutex);
    return stats_;
  }

 private:
  // The kept block that fits best, of equals the most recently used, whose pages are the likeliest
  // to be in cache; without data where none fits.
  Block take_kept(int64_t size) {
    auto best = kept_.end();
    for (auto it = kept_.begin(); it != kept_.end(); ++it) {
      const bool fits = it->size >= size && it->size - size <= size / 8;
      if (fits && (best == kept_.end() || it->size < best->size)) best = it;
    }
    if (best == kept_.end()) return {nullptr, 0};
    const Block block = *best;
    kept_.erase(best);
    stats_.cached -= block.size;
    return block;
  }

  void trim(int64_t limit) {
    while (stats_.cached > limit) {
      const Block oldest = kept_.back();
      kept_.pop_back();
      stats_.cached -= oldest.size;
      stats_.returned++;
      allow_access(oldest.data, oldest.size, oldest.size);  // whoever gets these pages next
      munmap(oldest.data, static_cast<size_t>(oldest.size));
    }
  }

  std::list<Block> kept_;  // most recently used first
  std::unordered_map<void*, int64_t> used_;
  Stats stats_{};
};

}  // namespace

void* allocate(int64_t bytes) { return Pool::instance().allocate(bytes); }
void release(void* block) { Pool::instance().release(block); }
void configure(bool enabled, int64_t limit) { Pool::instance().configure(enabled, limit); }
void empty_cache() { Pool::instance().empty_cache(); }
Stats stats() { return Pool::instance().stats(); }

}  // namespace torchconv::memory_pool
