// Depthwise wgrad in NCHW: wgrad_planes.cuh with one filter a block.
#include "cuda/depthwise.h"
#include "cuda/wgrad_planes.cuh"

namespace torchconv::cuda {

void depthwise_planes_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                            const void* dz, const void* x, void* dw, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    with_taps<T, false>(R, sampling, [&](auto taps) {
      using Tap = decltype(taps);
      launch_wgrad_planes<T, Tap, Tap::R == 7 ? 7 : 4, 1>(
          g, static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dw), queue);
    });
  });
}

}  // namespace torchconv::cuda
