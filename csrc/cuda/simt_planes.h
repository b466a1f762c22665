// fprop and dgrad in exact float32 over NCHW: see simt_planes.cu.
#pragma once

#include "cuda/activation.h"
#include "cuda/queue.h"
#include "cuda/simt_view.h"

namespace torchconv::cuda {

// Whether it computes a view of simt_view.h, and then with the bits of simt_gather_kernel.h.
bool simt_planes_takes(const SimtView& v, const float* target, const Queue& queue);

// What the multiprocessor that ends last takes, in elements of a tile times chunks of
// simt_gather_kernel.h.
double simt_planes_cost(const SimtView& v, const Queue& queue);

void simt_planes(const SimtView& v, const float* source, const float* w,
                 const Epilogue<float>& epilogue, const Queue& queue);

}  // namespace torchconv::cuda
