// Grouped convolution of 3 x 3 taps on tensor cores, the gradient by the weights, for bfloat16: see
// grouped_mma_rows.h.
#include "cuda/grouped_mma_rows_wgrad_kernel.h"

namespace torchconv::cuda {

template void run_grouped_rows_wgrad<BFloat16>(GroupedRowsWgrad, const Queue&);

}  // namespace torchconv::cuda
