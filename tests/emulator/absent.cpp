// Kernels that the emulated library may lack, because they are for one processor alone (CUTLASS) or
// are left out of a build: weak, so that the kernels themselves take their place where they are.
#include <stdexcept>
#include <string>

#include "cuda/adaptive_pool2d.h"
#include "cuda/conv_choice.h"
#include "cuda/conv_layout.h"
#include "cuda/conv_passes.h"
#include "cuda/pool2d.h"

#define WEAK __attribute__((weak))
// An algorithm of three passes, the first of which adds a residual.
#define ABSENT_ALGORITHM(name)                                                                   \
  WEAK void name##_fprop(const ConvProblem&, const void*, const void*, const void*, const void*, \
                         void*, void*, const Queue&) {                                           \
    absent(#name "_fprop");                                                                      \
  }                                                                                              \
  WEAK void name##_dgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {    \
    absent(#name "_dgrad");                                                                      \
  }                                                                                              \
  WEAK void name##_wgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {    \
    absent(#name "_wgrad");                                                                      \
  }

namespace torchconv::cuda {
namespace {

[[noreturn]] void absent(const char* name) {
  throw std::runtime_error(std::string("the emulated library has no ") + name);
}

}  // namespace

ABSENT_ALGORITHM(simt)
ABSENT_ALGORITHM(depthwise)
ABSENT_ALGORITHM(grouped)
ABSENT_ALGORITHM(grouped_mma)
ABSENT_ALGORITHM(mma)
WEAK void grouped_fprop(const ConvProblem&, const void*, const void*, const void*, void*, void*,
                        const Queue&) {
  absent("grouped_fprop");
}
WEAK void cutlass_fprop(const ConvProblem&, const void*, const void*, const void*, const void*,
                        void*, const Queue&) {
  absent("cutlass_fprop");
}
WEAK void cutlass_dgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {
  absent("cutlass_dgrad");
}
WEAK void cutlass_wgrad(const ConvProblem&, const void*, const void*, void*, const Queue&) {
  absent("cutlass_wgrad");
}
WEAK bool depthwise_gradients(const ConvProblem&, const void*, const void*, const void*, void*,
                              void*, const Queue&) {
  return false;
}
WEAK bool depthwise_takes(const ConvProblem&, Pass) { return false; }
WEAK bool grouped_takes(const ConvProblem&, Pass) { return false; }
WEAK bool grouped_mma_takes(const ConvProblem&, Pass, const Queue&) { return false; }
WEAK bool mma_takes(const ConvProblem&, Pass, const Queue&) { return false; }
WEAK bool cutlass_takes(const ConvProblem&, Pass, bool, bool, const Queue&) { return false; }
WEAK void activation_backward(const ConvProblem&, const void*, const void*, void*, void*,
                              const Queue&) {
  absent("activation_backward");
}

WEAK void transpose(DType, const void*, void*, int64_t, int64_t, int64_t, const Queue&) {
  absent("transpose");
}
WEAK void pack_weights(DType, const void*, Layout, bool, void*, int64_t, int64_t, int64_t, int64_t,
                       const Queue&) {
  absent("pack_weights");
}

WEAK void select_pool2d(const PoolProblem&, Select, const void*, void*, void*, int64_t*,
                        const Queue&) {
  absent("select_pool2d");
}
WEAK void select_pool2d_backward(const PoolProblem&, Selected, const void*, const void*, void*,
                                 const Queue&) {
  absent("select_pool2d_backward");
}
WEAK void select_pool2d_gather(const PoolProblem&, Selected, const void*, const void*, void*,
                               const Queue&) {
  absent("select_pool2d_gather");
}
WEAK void avg_pool2d(const PoolProblem&, const void*, void*, const Queue&) { absent("avg_pool2d"); }
WEAK void avg_pool2d_backward(const PoolProblem&, const void*, void*, const Queue&) {
  absent("avg_pool2d_backward");
}
WEAK void adaptive_avg_pool2d(const AdaptiveProblem&, const void*, void*, const Queue&) {
  absent("adaptive_avg_pool2d");
}
WEAK void adaptive_avg_pool2d_backward(const AdaptiveProblem&, const void*, void*, const Queue&) {
  absent("adaptive_avg_pool2d_backward");
}
WEAK void adaptive_max_pool2d(const AdaptiveProblem&, const void*, void*, int64_t*, const Queue&) {
  absent("adaptive_max_pool2d");
}
WEAK void adaptive_max_pool2d_backward(const AdaptiveProblem&, const void*, const int64_t*, void*,
                                       const Queue&) {
  absent("adaptive_max_pool2d_backward");
}
WEAK void adaptive_max_pool2d_gather(const AdaptiveProblem&, const void*, const int64_t*, void*,
                                     const Queue&) {
  absent("adaptive_max_pool2d_gather");
}

}  // namespace torchconv::cuda
