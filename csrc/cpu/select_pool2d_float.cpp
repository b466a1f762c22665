// Max and min pooling of float32 and float64.
#include "cpu/select_pool2d_kernels.h"

namespace torchconv::cpu {

template void select_pool2d_as(const PoolProblem&, LaneInt<float>, const float*, float*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<double>, const double*, double*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
