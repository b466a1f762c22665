// Scratch memory of one call: 64-byte aligned, uninitialised, given back at the end of its scope.
// Large scratch comes from the memory pool. Small scratch is aligned here, as glibc's aligned_alloc
// takes several times as long as malloc: a good part of a call on small images.
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
        std::free(static_cast<void**>(static_cast<void*>(p))[-1]);
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
    void* const p = std::malloc(static_cast<size_t>(bytes + kAlignment));
    if (p == nullptr) throw std::bad_alloc();
    // malloc aligns to two pointers at least: the one before the scratch has room.
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kAlignment) / kAlignment * kAlignment;
    reinterpret_cast<void**>(begin)[-1] = p;
    return Pointer(reinterpret_cast<T*>(begin), Free{});
  }
  static constexpr int64_t kAlignment = 64;
  Pointer data_;
};

}  // namespace torchconv
