// The kernels that this library's operators call, and the dispatch key that they are registered
// for. csrc/ops/*.cpp is compiled once for the CPU's library and once, with TORCHCONV_CUDA, for the
// GPU's. Both processors' kernels take the same arguments but for the last one, which says where to
// run: an Execution converts to it.
#pragma once

#include <string>

#include "ops/execution.h"

#ifdef TORCHCONV_CUDA

#include "cuda/adaptive_pool2d.h"
#include "cuda/conv2d.h"
#include "cuda/pool2d.h"
#ifdef TORCHCONV_EMULATE_CUDA  // the kernels of the GPU on the CPU, for tests
#define TORCHCONV_KEY CPU
#else
#define TORCHCONV_KEY CUDA
#endif
namespace torchconv::ops {
namespace kernels = torchconv::cuda;
inline std::string explanation(const ConvProblem& p, const Execution& run) {
  return kernels::conv2d_explain(p, run);
}
}  // namespace torchconv::ops

#else

#include "cpu/adaptive_pool2d.h"
#include "cpu/conv2d.h"
#include "cpu/conv_explain.h"
#include "cpu/pool2d.h"
#define TORCHCONV_KEY CPU
namespace torchconv::ops {
namespace kernels = torchconv::cpu;
inline std::string explanation(const ConvProblem& p, const Execution&) {
  return kernels::conv2d_explain(p);
}
}  // namespace torchconv::ops

#endif
