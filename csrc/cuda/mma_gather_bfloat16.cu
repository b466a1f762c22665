// Forward convolution and its gradient by the image on tensor cores, for bfloat16: see
// mma_gather.h.
#include "cuda/mma_gather_kernel.h"

namespace torchconv::cuda {

template void run_gather(GatherProblem, const Epilogue<BFloat16>&, const Queue&);

}  // namespace torchconv::cuda
