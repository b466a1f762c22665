// Max and min pooling of the integer types.
#include "cpu/select_pool2d_kernels.h"

namespace torchconv::cpu {

template void select_pool2d_as(const PoolProblem&, Select, const uint8_t*, uint8_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int8_t*, int8_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int16_t*, int16_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int32_t*, int32_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const int64_t*, int64_t*, SelectedArray,
                               const Parallel&);
template void select_pool2d_as(const PoolProblem&, Select, const uint16_t*, uint16_t*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
