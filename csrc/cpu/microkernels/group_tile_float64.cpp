// The tiles of grouped convolution for double.
#include "cpu/microkernels/group_tile_impl.h"

namespace torchconv::cpu {

template GroupSumKernel<double> group_sum_kernel(int64_t, int64_t, bool, int64_t);
template void group_dot(const GroupDot<double>&, int64_t);

}  // namespace torchconv::cpu
