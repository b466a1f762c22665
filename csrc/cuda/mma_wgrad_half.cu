// The weights' gradient on tensor cores, for float16: see mma_wgrad.h.
#include "cuda/mma_wgrad_kernel.h"

namespace torchconv::cuda {

template void run_wgrad<Half>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
