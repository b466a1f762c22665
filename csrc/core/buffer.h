// Scratch memory of one call: 64-byte aligned, uninitialised, given back at the end of its scope.
// Large scratch comes from the memory pool. Both ways are in buffer.cpp, so that kernels, which
// have many instances, do not each compile them.
#pragma once

#include <cstdint>
#include <memory>

namespace torchconv {

struct ScratchBlock {
  void* data;
  bool pooled;
};
// count elements of `size` bytes. Throws std::bad_alloc.
ScratchBlock allocate_scratch(int64_t count, int64_t size);
void release_scratch(ScratchBlock block);

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : Buffer(allocate_scratch(count, sizeof(T))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    bool pooled = false;
    void operator()(T* p) const { release_scratch({p, pooled}); }
  };

  explicit Buffer(ScratchBlock block) : data_(static_cast<T*>(block.data), Free{block.pooled}) {}

  std::unique_ptr<T, Free> data_;
};

}  // namespace torchconv
