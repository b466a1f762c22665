// Convolutions of 1x1 kernels over NCHW on tensor cores, for float32 rounded to TF32: see
// mma_planes.h.
#include "cuda/mma_planes_kernel.h"

namespace torchconv::cuda {

template void run_planes(PlanesProblem, const Epilogue<float>&, const Queue&);
template void run_planes_wgrad<float>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
