// Tensors in memory of the pool (core/memory_pool.h), which the CPU's library has.
#pragma once

#include "ops/tensor_args.h"

namespace torchconv::ops {

// Null where the pool has none to give. strides and bytes are those of sizes, type PyTorch's number
// of an element type.
AtenTensorHandle pooled_tensor(const Tensor& like, IntList sizes, const int64_t* strides,
                               int32_t type, int64_t bytes);

}  // namespace torchconv::ops
