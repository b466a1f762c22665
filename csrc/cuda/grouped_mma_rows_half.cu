// Grouped convolution of 3 x 3 taps on tensor cores for float16: see grouped_mma_rows.h.
#include "cuda/grouped_mma_rows_kernel.h"

namespace torchconv::cuda {

template void run_grouped_rows(const GroupedRows&, const Epilogue<Half>&, const Queue&);

}  // namespace torchconv::cuda
