// Max and min pooling of the integer types; int8_t and int16_t run as unsigned (select_pool2d.cpp).
#include "cpu/select_pool2d_kernels.h"

namespace torchconv::cpu {

template void select_pool2d_as(const PoolProblem&, LaneInt<uint8_t>, const uint8_t*, uint8_t*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<uint16_t>, const uint16_t*, uint16_t*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<int32_t>, const int32_t*, int32_t*,
                               SelectedArray, const Parallel&);
template void select_pool2d_as(const PoolProblem&, LaneInt<int64_t>, const int64_t*, int64_t*,
                               SelectedArray, const Parallel&);

}  // namespace torchconv::cpu
