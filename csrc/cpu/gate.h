// A gate on every channel of an image, as squeeze-and-excite has it, where it is no part of a
// convolution: what a chain (ops/cpu/chain.cpp) multiplies.
#pragma once

#include <cstdint>

#include "core/parallel.h"
#include "core/types.h"

namespace torchconv::cpu {

// y[n, c, h, w] = x[n, c, h, w] * gate[n, c], dense in one layout; y may be x. float and double.
struct GateProblem {
  int64_t N, C, pixels;
  Layout layout;
  DType dtype;
};
void gate_channels(const GateProblem& p, const void* x, const void* gate, void* y,
                   const Parallel& pool);

// y = min(max(x + 3, 0), 6) / 6, with the bits of PyTorch's, of float or double. By one thread.
void hardsigmoid(DType dtype, int64_t count, const void* x, void* y);

}  // namespace torchconv::cpu
