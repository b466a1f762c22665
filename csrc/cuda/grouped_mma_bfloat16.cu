// Grouped convolution on tensor cores, forward and its gradient by the image, for bfloat16: see
// grouped_mma.h.
#include "cuda/grouped_mma_kernel.h"

namespace torchconv::cuda {

template void run_grouped_gather(const GroupedGather&, const Epilogue<BFloat16>&, const Queue&);

}  // namespace torchconv::cuda
