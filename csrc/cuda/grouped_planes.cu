// Grouped 3x3 convolution in NCHW: gather_planes.cuh and wgrad_planes.cuh with several output
// channels a thread.
#include "cuda/gather_planes.cuh"
#include "cuda/grouped.h"
#include "cuda/wgrad_planes.cuh"

namespace torchconv::cuda {

void grouped_planes(DType dtype, Sampling sampling, const Gather& g, const void* in, const void* w,
                    const void* bias, void* out, void* preactivation, Activation activation,
                    const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    with_group_taps<true>(sampling, [&](auto taps) {
      using Tap = decltype(taps);
      // The spread's pixels come in pairs of pairs.
      constexpr int kRows = Tap::kSpread ? 2 : 4, kColumns = Tap::kSpread ? 2 : 1;
      constexpr int kMany = sizeof(T) == 8 ? 4 : 8;
      const T* source = static_cast<const T*>(in);
      const T* weights = static_cast<const T*>(w);
      if (kMany > 4 && g.out_channels > 4)
        launch_gather_planes<T, Tap, kRows, kColumns, kMany>(g, source, weights, epilogue, queue);
      else
        launch_gather_planes<T, Tap, kRows, kColumns, 4>(g, source, weights, epilogue, queue);
    });
  });
}

void grouped_planes_wgrad(DType dtype, Sampling sampling, const Gather& g, const void* dz,
                          const void* x, void* dw, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    with_group_taps<false>(sampling, [&](auto taps) {
      launch_wgrad_planes<T, decltype(taps), 4, sizeof(T) == 8 ? 2 : 4>(
          g, static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dw), queue);
    });
  });
}

}  // namespace torchconv::cuda
