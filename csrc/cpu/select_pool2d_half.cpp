// Max and min pooling of bfloat16 and float16.
#include "cpu/select_pool2d_kernels.h"

namespace torchconv::cpu {

template void select_pool2d_as(const PoolProblem&, LaneInt<BFloat16>, const BFloat16*, BFloat16*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<Float16>, const Float16*, Float16*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
