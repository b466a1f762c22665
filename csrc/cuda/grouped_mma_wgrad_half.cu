// Grouped convolution on tensor cores, the gradient by the weights, for float16: see grouped_mma.h.
#include "cuda/grouped_mma_wgrad_kernel.h"

namespace torchconv::cuda {

template void run_grouped_wgrad<Half>(GroupedWgrad, const Queue&);

}  // namespace torchconv::cuda
