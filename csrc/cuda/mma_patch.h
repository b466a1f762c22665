// fprop of few channels (an image's three) on tensor cores. The sum of mma_gather.h, but a block
// keeps the patch of the image under its tile of outputs in shared memory, where every output's
// terms are read from the place they have in the image: what is gathered once a tap there is copied
// once here.
//
// The patch is made of chunks of 16 bytes, what ldmatrix reads of one row: one pixel, or, of half
// types where the stride is even, two neighbours of four channels. A row of taps is a row of such
// chunks, whatever the output, and the chunks of neighbouring outputs lie side by side: chunks that
// the stride keeps apart are sorted by their residue. What a chunk has beyond the channels is zero,
// and so is the second pixel of the last chunk of an odd row of taps, which has a copy of its own:
// nothing that is not a term can bring NaN into a sum.
//
// A block of four warps computes tile after tile of 8 x 16 outputs by 64 filters, which stay in
// shared memory, and loads the next tile's patch meanwhile. Bound: reading the image and writing
// the output once, or 2 * pixels * filters * taps * 4 operations. The order of a sum is that of the
// taps, whatever the tile.
#pragma once

#include <algorithm>

#include "core/conv_problem.h"
#include "cuda/activation.h"
#include "cuda/conv_layout.h"
#include "cuda/shared_memory.h"

namespace torchconv::cuda {

// The tensor, or a copy of it, at an address that whole units of 16 bytes can be loaded from.
template <typename T>
const T* on_16_bytes(DType dtype, const T* source, int64_t count, const Queue& queue) {
  if (aligned<T>(source, kLanes<T>)) return source;
  T* copy = queue.scratch<T>(count);
  transpose(dtype, source, copy, 1, 1, count, queue);
  return copy;
}

// What a block of these kernels may have of shared memory: at least two are to run at a time.
inline int shared_of_patch(const Queue& queue) {
  return std::min(112 * 1024, shared_of_block(queue.capability));
}

// Whether the kernel takes fprop: by the problem of one sample.
bool patch_takes(const ConvProblem& p, const Queue& queue);

// x and y in either layout, and w.
template <typename T>
void run_patch(const ConvProblem& p, const T* x, const T* w, const Epilogue<T>& epilogue,
               const Queue& queue);

// The same for dgrad, dz and dx NHWC: see mma_patch_dgrad.cu.
bool patch_dgrad_takes(const ConvProblem& p, const Queue& queue);
template <typename T>
void run_patch_dgrad(const ConvProblem& p, const T* dz, const T* w, T* dx, const Queue& queue);

// And for wgrad, x and dz NHWC: see mma_patch_wgrad.cu.
bool patch_wgrad_takes(const ConvProblem& p, const Queue& queue);
template <typename T>
void run_patch_wgrad(const ConvProblem& p, const T* dz, const T* x, T* dw, const Queue& queue);

}  // namespace torchconv::cuda
