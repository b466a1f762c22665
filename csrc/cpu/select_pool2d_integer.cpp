// Max and min pooling of the integer types, computed in int32_t or int64_t lanes. The kernels are
// in pool2d_nchw.h and pool2d_nhwc.h.
#include "cpu/select_pool2d_layouts.h"

namespace torchconv::cpu {

TORCHCONV_INSTANTIATE_SELECT(uint8_t)
TORCHCONV_INSTANTIATE_SELECT(int8_t)
TORCHCONV_INSTANTIATE_SELECT(int16_t)
TORCHCONV_INSTANTIATE_SELECT(int32_t)
TORCHCONV_INSTANTIATE_SELECT(int64_t)
TORCHCONV_INSTANTIATE_SELECT(uint16_t)

}  // namespace torchconv::cpu
