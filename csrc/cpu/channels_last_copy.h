// Copies of contiguous images and weights whose channels are neighbours, and back. Where rows are
// short, or a stride leaves few pixels of them, vectors along pixels are mostly empty, or few
// products share what each row takes: such a problem in NCHW takes longer than its copies and the
// same problem in channels_last.
#pragma once

#include "core/buffer.h"
#include "core/conv_problem.h"
#include "core/parallel.h"

namespace torchconv::cpu {

// The same problem, of a single group, with images and weights in channels_last.
ConvProblem channels_last_problem(const ConvProblem& p);
// The same problem, with the weights as they are.
ConvProblem channels_last_images(const ConvProblem& p);
// And in NCHW.
ConvProblem contiguous_problem(const ConvProblem& p);

// to[n][column][row] = from[n][row][column] of n matrices, where a row is a channel or a pixel.
// Instantiated for float and double.
template <typename T>
void transpose_images(const T* from, int64_t n, int64_t rows, int64_t columns, T* to,
                      const Parallel& pool);

// The copy of an NCHW image, or of filters in that order.
template <typename T>
Buffer<T> channels_last_copy(const T* from, int64_t n, int64_t channels, int64_t pixels,
                             const Parallel& pool) {
  Buffer<T> copy(n * channels * pixels);
  transpose_images(from, n, channels, pixels, copy.get(), pool);
  return copy;
}

// Images that are dense in one layout, made dense in the other one.
struct LayoutChange {
  int64_t size;  // of an element
  int64_t n, channels, pixels;
  Layout layout;  // of the result

  // Whether there is a kernel.
  bool exists() const;
  int64_t bytes() const { return n * channels * pixels * size; }
  void run(const void* from, void* to, const Parallel& pool) const;
};

}  // namespace torchconv::cpu
