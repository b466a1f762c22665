// Convolutions of 1x1 kernels over NCHW on tensor cores, for float16: see
// mma_planes.h.
#include "cuda/mma_planes_gradients_kernel.h"
#include "cuda/mma_planes_kernel.h"
#include "cuda/mma_planes_resident_kernel.h"

namespace torchconv::cuda {

template void run_planes(PlanesProblem, const Epilogue<Half>&, const Queue&);
template bool run_resident(const PlanesProblem&, bool, const Epilogue<Half>&, const Queue&);
template void run_planes_gradients(PlanesGradients, const Epilogue<Half>&, const Queue&);
template void run_planes_wgrad<Half>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
