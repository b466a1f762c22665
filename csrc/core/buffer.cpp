// Scratch memory, see buffer.h. Small scratch is aligned here, as glibc's aligned_alloc takes
// several times as long as malloc: a good part of a call on small images. The address sanitizer
// aligns by itself: what precedes the scratch must not be of its block.
#include "core/buffer.h"

#include <cstdlib>
#include <limits>
#include <new>

#include "core/memory_pool.h"

namespace torchconv {
namespace {

constexpr int64_t kAlignment = 64;

#if defined(__SANITIZE_ADDRESS__)
void* allocate_aligned(int64_t bytes) {
  return std::aligned_alloc(kAlignment, static_cast<size_t>(bytes));
}
void free_aligned(void* p) { std::free(p); }
#else
void* allocate_aligned(int64_t bytes) {
  void* const p = std::malloc(static_cast<size_t>(bytes + kAlignment));
  if (p == nullptr) return nullptr;
  // malloc aligns to two pointers at least: the one before the scratch has room.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kAlignment) / kAlignment * kAlignment;
  void** const scratch = reinterpret_cast<void**>(begin);
  scratch[-1] = p;
  return scratch;
}
void free_aligned(void* p) { std::free(static_cast<void**>(p)[-1]); }
#endif

}  // namespace

ScratchBlock allocate_scratch(int64_t count, int64_t size) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 2;
  if (count < 0 || count > kMost / size) throw std::bad_alloc();
  const int64_t bytes = (count * size + 2 * kAlignment - 1) / kAlignment * kAlignment;
  if (void* const block = memory_pool::allocate(bytes)) return {block, true};
  void* const p = allocate_aligned(bytes);
  if (p == nullptr) throw std::bad_alloc();
  return {p, false};
}

void release_scratch(ScratchBlock block) {
  if (block.pooled) return memory_pool::release(block.data);
  free_aligned(block.data);
}

}  // namespace torchconv
