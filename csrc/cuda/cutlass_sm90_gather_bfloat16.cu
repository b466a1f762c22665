// The gather of cutlass_sm90_gather_kernel.h for bfloat16.
#ifdef TORCHCONV_CUTLASS
#include "cuda/cutlass_sm90_gather_kernel.h"

namespace torchconv::cuda::sm90 {

void gather_bfloat16(const Gather& g, const GatherTensors& tensors, const Queue& queue) {
  gather_of<cutlass::bfloat16_t>(g, tensors, queue);
}

}  // namespace torchconv::cuda::sm90
#endif
