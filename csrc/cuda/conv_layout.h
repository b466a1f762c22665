// Copies of images and weights in the form that a kernel reads.
#pragma once

#include "core/types.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

// N matrices of A rows of B elements, and of B rows of A: planes, or the taps of filters. One copy
// of those that conv_layout.cu makes side by side.
struct SmallMatrices {
  const void* source;
  void* target;
  int64_t N, A;
  int B;
  int matrices, rows, pieces;  // of a block: so many matrices, or a piece of one's rows
  int together;                // units of a row of B x A that neighbouring threads have
  bool flip;                   // rows of B x A from the last on
  bool forth;                  // from A x B to B x A
  unsigned blocks;
  int bytes;  // of a block's shared memory
};
struct SmallCopies {
  static constexpr int kMost = 3;
  SmallMatrices copy[kMost];
};

// Copies of a call that do not depend on each other: small ones wait, and run in one launch. Of
// floating-point types.
class Copies {
 public:
  Copies(DType dtype, const Queue& queue) : dtype_(dtype), queue_(queue) {}
  // target[n, b, a] = source[n, a, b], for N matrices of A x B elements: with A = C and B = H*W
  // from NCHW to NHWC, the other way round back.
  void transpose(const void* source, void* target, int64_t N, int64_t A, int64_t B);
  // K x R x S x C from a weight of C channels a filter in either layout, each kernel turned by 180
  // degrees with flip; and back, for the weight's gradient.
  void pack_weights(const void* w, Layout layout, bool flip, void* packed, int64_t K, int64_t C,
                    int64_t R, int64_t S);
  void unpack_weights(const void* packed, void* w, Layout layout, bool flip, int64_t K, int64_t C,
                      int64_t R, int64_t S);
  bool waiting() const { return count_ > 0; }
  void run();

 private:
  bool takes(const void* source, void* target, int64_t N, int64_t A, int64_t B, bool flip,
             bool forth);
  DType dtype_;
  const Queue& queue_;
  SmallCopies small_{};
  int count_ = 0;
};

// The same, of one copy.
void transpose(DType dtype, const void* source, void* target, int64_t N, int64_t A, int64_t B,
               const Queue& queue);
void pack_weights(DType dtype, const void* w, Layout layout, bool flip, void* packed, int64_t K,
                  int64_t C, int64_t R, int64_t S, const Queue& queue);

// Rows of `from` elements become rows of `to`, cut or filled with zeros. Floating-point types.
void resize_rows(DType dtype, const void* source, void* target, int64_t rows, int64_t from,
                 int64_t to, const Queue& queue);

}  // namespace torchconv::cuda
