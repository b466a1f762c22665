// Forward convolution and its gradient by the image on tensor cores, for float32 rounded to TF32:
// see mma_gather.h.
#include "cuda/mma_gather_kernel.h"

namespace torchconv::cuda {

template void run_gather(GatherProblem, const Epilogue<float>&, const Queue&);

}  // namespace torchconv::cuda
