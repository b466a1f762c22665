// Whole arrays, by several threads: in the type that they are computed in, and back, and zeros.
#pragma once

#include <cstring>
#include <type_traits>

#include "core/buffer.h"
#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_pack.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {

// f(first, n) on pieces of `size` elements that stay in the second-level cache.
template <typename F>
void for_array_pieces(int64_t size, const Parallel& pool, F&& f) {
  constexpr int64_t kPiece = 1 << 14;
  const WorkSplit split(ceil_div(size, kPiece), static_cast<double>(kPiece));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t piece = begin; piece < end; ++piece)
      f(piece * kPiece, std::min(kPiece, size - piece * kPiece));
  });
}

// The first `size` elements of data, or of nothing: a copy, but for the type that is computed in.
template <typename T>
class WideArray {
 public:
  WideArray(const T* data, int64_t size, const Parallel& pool)
      : data_(data), copy_(std::is_same_v<T, Wide<T>> || data == nullptr ? 0 : size) {
    if constexpr (!std::is_same_v<T, Wide<T>>) {
      if (data == nullptr) return;
      for_array_pieces(size, pool,
                       [&](int64_t i, int64_t n) { copy_wide(copy_.get() + i, data + i, n); });
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
  for_array_pieces(size, pool, [&](int64_t i, int64_t n) { copy_narrow(dst + i, src + i, n); });
}

// All of z, which lies as the destination and is overwritten.
template <typename T>
void store_array(const Epilogue<T>& epilogue, Wide<T>* z, int64_t size, const Parallel& pool) {
  for_array_pieces(size, pool, [&](int64_t i, int64_t n) { epilogue.store(z + i, n, i, 1); });
}

// dst[i] = 0.
template <typename T>
void zero_array(T* dst, int64_t size, const Parallel& pool) {
  for_array_pieces(size, pool, [&](int64_t i, int64_t n) {
    std::memset(dst + i, 0, static_cast<size_t>(n) * sizeof(T));
  });
}

}  // namespace torchconv::cpu
