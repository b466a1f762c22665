// Grouped convolution of 3 x 3 taps on tensor cores for bfloat16: see grouped_mma_rows.h.
#include "cuda/grouped_mma_rows_kernel.h"

namespace torchconv::cuda {

template void run_grouped_rows(const GroupedRows&, const Epilogue<BFloat16>&, const Queue&);

}  // namespace torchconv::cuda
