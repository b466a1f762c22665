// Depthwise fprop and dgrad in NCHW: the gather of gather_planes.cuh, one output channel a thread.
#include "cuda/depthwise.h"
#include "cuda/gather_planes.cuh"

namespace torchconv::cuda {

void depthwise_planes(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue) {
  with_float(dtype, [&](auto element) {
    using T = decltype(element);
    const Epilogue<T> epilogue{static_cast<const T*>(bias), static_cast<T*>(out),
                               static_cast<T*>(preactivation), activation};
    with_taps<T, true>(R, sampling, [&](auto taps) {
      using Tap = decltype(taps);
      constexpr int kRows = Tap::R == 7 ? 7 : 4, kColumns = Tap::kSpread ? 2 : 1;
      launch_gather_planes<T, Tap, kRows, kColumns, 1>(g, static_cast<const T*>(in),
                                                       static_cast<const T*>(w), epilogue, queue);
    });
  });
}

}  // namespace torchconv::cuda
