// Whole arrays in the type that they are computed in, and back.
#pragma once

#include <type_traits>

#include "core/buffer.h"
#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {

// The first `size` elements of data, or of nothing: a copy, but for the type that is computed in.
template <typename T>
class WideArray {
 public:
  WideArray(const T* data, int64_t size, const Parallel& pool)
      : data_(data), copy_(std::is_same_v<T, Wide<T>> || data == nullptr ? 0 : size) {
    if constexpr (!std::is_same_v<T, Wide<T>>) {
      if (data == nullptr) return;
      constexpr int64_t kPiece = 1 << 14;
      const WorkSplit split(ceil_div(size, kPiece), static_cast<double>(kPiece));
      split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
        const int64_t first = begin * kPiece, last = std::min(end * kPiece, size);
        copy_wide(copy_.get() + first, data + first, last - first);
      });
    }
  }
  const Wide<T>* get() const {
    if constexpr (std::is_same_v<T, Wide<T>>)
      return data_;
    else
      return data_ != nullptr ? copy_.get() : nullptr;
  }

 private:
  const T* data_;
  Buffer<Wide<T>> copy_;
};

// dst[i] = src[i], rounded.
template <typename T>
void narrow_array(T* dst, const Wide<T>* src, int64_t size, const Parallel& pool) {
  constexpr int64_t kPiece = 1 << 14;
  const WorkSplit split(ceil_div(size, kPiece), static_cast<double>(kPiece));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    const int64_t first = begin * kPiece, last = std::min(end * kPiece, size);
    copy_narrow(dst + first, src + first, last - first);
  });
}

}  // namespace torchconv::cpu
