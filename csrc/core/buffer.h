// Scratch memory of one call: 64-byte aligned, uninitialised, freed at the end of its scope.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace torchconv {

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(count)) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  static T* allocate(int64_t count) {
    if (count < 0 ||
        count > std::numeric_limits<int64_t>::max() / 2 / static_cast<int64_t>(sizeof(T)))
      throw std::bad_alloc();
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, bytes);
    if (p == nullptr) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  std::unique_ptr<T, Free> data_;
};

}  // namespace torchconv
