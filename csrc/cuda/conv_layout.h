// Copies of images and weights in the form that a kernel reads.
#pragma once

#include "core/types.h"
#include "cuda/queue.h"

namespace torchconv::cuda {

// target[n, b, a] = source[n, a, b], for N matrices of A x B elements: with A = C and B = H*W from
// NCHW to NHWC, the other way round back. Floating-point types.
void transpose(DType dtype, const void* source, void* target, int64_t N, int64_t A, int64_t B,
               const Queue& queue);

// Rows of `from` elements become rows of `to`, cut or filled with zeros. Floating-point types.
void resize_rows(DType dtype, const void* source, void* target, int64_t rows, int64_t from,
                 int64_t to, const Queue& queue);

// K x R x S x C from a weight of C channels a filter in either layout, each kernel turned by 180
// degrees with flip; and back, for the weight's gradient.
void pack_weights(DType dtype, const void* w, Layout layout, bool flip, void* packed, int64_t K,
                  int64_t C, int64_t R, int64_t S, const Queue& queue);
void unpack_weights(DType dtype, const void* packed, void* w, Layout layout, bool flip, int64_t K,
                    int64_t C, int64_t R, int64_t S, const Queue& queue);

}  // namespace torchconv::cuda
