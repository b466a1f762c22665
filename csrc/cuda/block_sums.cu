// The last stage of a reduction in slices: neighbouring threads have neighbouring elements, and up
// to 32 threads share the slices of one. Bound: the bytes of the partial sums.
#include "core/range.h"
#include "cuda/block_sums.cuh"
#include "cuda/early_launch.h"

namespace torchconv::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_slices_kernel(SliceSums<T> sums, int64_t slices, int shares) {
  __shared__ double shared[kThreads];
  begin_early();
  const int width = kThreads / shares, thread = static_cast<int>(threadIdx.x);
  const int64_t element = static_cast<int64_t>(blockIdx.x) * width + thread % width;
  double total = 0;
  if (element < sums.elements)
#pragma unroll 4
    for (int64_t slice = thread / width; slice < slices; slice += shares)
      total += static_cast<double>(sums.partial[slice * sums.elements + element]);
  shared[thread] = total;
  __syncthreads();
  if (thread >= width || element >= sums.elements) return;
  for (int share = 1; share < shares; ++share) total += shared[share * width + thread];
  sums.result[element] = from_wide<T>(static_cast<Wide<T>>(total));
}

}  // namespace

template <typename T>
void add_slices(const SliceSums<T>& sums, int64_t slices, const Queue& queue) {
  if (sums.partial == nullptr) return;
  int shares = 1;
  while (shares < 32 && shares * 4 < slices) shares *= 2;
  const int64_t blocks = ceil_div(sums.elements, kThreads / shares);
  launch_early(add_slices_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, queue,
               sums, slices, shares);
}

template void add_slices(const SliceSums<float>&, int64_t, const Queue&);
template void add_slices(const SliceSums<double>&, int64_t, const Queue&);
template void add_slices(const SliceSums<Half>&, int64_t, const Queue&);
template void add_slices(const SliceSums<BFloat16>&, int64_t, const Queue&);

}  // namespace torchconv::cuda
