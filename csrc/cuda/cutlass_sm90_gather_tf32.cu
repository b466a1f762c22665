// The gather of cutlass_sm90_gather_kernel.h for float32, rounded to TF32.
#ifdef TORCHCONV_CUTLASS
#include "cuda/cutlass_sm90_gather_kernel.h"

namespace torchconv::cuda::sm90 {

void gather_tf32(const Gather& g, const GatherTensors& tensors, const Queue& queue) {
  gather_of<float>(g, tensors, queue);
}

}  // namespace torchconv::cuda::sm90
#endif
