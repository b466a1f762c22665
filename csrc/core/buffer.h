// Scratch memory of one call: 64-byte aligned, uninitialised, given back at the end of its scope.
// Large scratch comes from the memory pool. Small scratch is aligned here, as glibc's aligned_alloc
// takes several times as long as malloc: a good part of a call on small images. The address
// sanitizer aligns by itself: what precedes the scratch must not be of its block.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

#include "core/memory_pool.h"

namespace torchconv {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(count)) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    bool pooled = false;
    void operator()(T* p) const {
      if (pooled)
        memory_pool::release(p);
      else
        free_aligned(p);
    }
  };
  using Pointer = std::unique_ptr<T, Free>;

  static Pointer allocate(int64_t count) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / 2;
    if (count < 0 || count > kMost / static_cast<int64_t>(sizeof(T))) throw std::bad_alloc();
    const int64_t bytes =
        (count * static_cast<int64_t>(sizeof(T)) + 2 * kAlignment - 1) / kAlignment * kAlignment;
    if (void* block = memory_pool::allocate(bytes))
      return Pointer(static_cast<T*>(block), Free{true});
    void* const p = allocate_aligned(bytes);
    if (p == nullptr) throw std::bad_alloc();
    return Pointer(static_cast<T*>(p), Free{});
  }

  static constexpr int64_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
  static void* allocate_aligned(int64_t bytes) {
    return std::aligned_alloc(kAlignment, static_cast<size_t>(bytes));
  }
  static void free_aligned(void* p) { std::free(p); }
#else
  static void* allocate_aligned(int64_t bytes) {
    void* const p = std::malloc(static_cast<size_t>(bytes + kAlignment));
    if (p == nullptr) return nullptr;
    // malloc aligns to two pointers at least: the one before the scratch has room.
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kAlignment) / kAlignment * kAlignment;
    void** const scratch = reinterpret_cast<void**>(begin);
    scratch[-1] = p;
    return scratch;
  }
  static void free_aligned(void* p) { std::free(static_cast<void**>(p)[-1]); }
#endif
  Pointer data_;
};

}  // namespace torchconv
