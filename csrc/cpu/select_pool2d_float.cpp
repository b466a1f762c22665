// Max and min pooling of float32 and float64, and by large windows of bfloat16 and float16 too.
#include "cpu/select_pool2d_kernels.h"

namespace torchconv::cpu {

template <bool kCodes>
void select_large(const PoolProblem& p, Selection<float> rule, const void* x, void* y,
                  SelectedArray selected, const Parallel& pool) {
  using Kernel = PoolLarge<Selection<float>, kCodes, float, BFloat16, Float16>;
  Kernel(p, rule, x, y, selected).run(pool);
}
template void select_large<true>(const PoolProblem&, Selection<float>, const void*, void*,
                                 SelectedArray, const Parallel&);
template void select_large<false>(const PoolProblem&, Selection<float>, const void*, void*,
                                  SelectedArray, const Parallel&);

template void select_pool2d_as(const PoolProblem&, LaneInt<float>, const float*, float*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<double>, const double*, double*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
