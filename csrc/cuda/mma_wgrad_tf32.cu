// The weights' gradient on tensor cores, for float32 rounded to TF32: see mma_wgrad.h.
#include "cuda/mma_wgrad_kernel.h"

namespace torchconv::cuda {

template void run_wgrad<float>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
