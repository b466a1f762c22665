// Max and min pooling of float32, float64, bfloat16 and float16. The kernels are in
// pool2d_nchw.h and pool2d_nhwc.h; the element types are split over two files only to
// compile them side by side.
#include "cpu/select_pool2d_layouts.h"

namespace torchconv::cpu {

TORCHCONV_INSTANTIATE_SELECT(float)
TORCHCONV_INSTANTIATE_SELECT(double)
TORCHCONV_INSTANTIATE_SELECT(BFloat16)
TORCHCONV_INSTANTIATE_SELECT(Float16)

}  // namespace torchconv::cpu
