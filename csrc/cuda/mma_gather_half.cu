// Forward convolution and its gradient by the image on tensor cores, for float16: see mma_gather.h.
#include "cuda/mma_gather_kernel.h"

namespace torchconv::cuda {

template void run_gather(GatherProblem, const Epilogue<Half>&, const Queue&);

}  // namespace torchconv::cuda
