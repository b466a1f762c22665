// The kernels behind the grouped_* functions of conv_passes.h, for 3x3; grouped.cu chooses.
#pragma once

#include "cuda/gather.h"

namespace torchconv::cuda {

// f(Taps<3, sampling>{}) without dilation. kSpread: dgrad's too.
template <bool kSpread, typename F>
void with_group_taps(Sampling sampling, F&& f) {
  if (sampling == Sampling::kUnit) return f(Taps<3, Sampling::kUnit>{});
  if (sampling == Sampling::kStride2) return f(Taps<3, Sampling::kStride2>{});
  if constexpr (kSpread) f(Taps<3, Sampling::kSpread2>{});
}

// fprop and dgrad, pixels contiguous.
void grouped_planes(DType dtype, Sampling sampling, const Gather& g, const void* in, const void* w,
                    const void* bias, void* out, void* preactivation, Activation activation,
                    const Queue& queue);

// The same with channels contiguous.
void grouped_channels(DType dtype, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue);

// wgrad; sampling and g are fprop's.
void grouped_planes_wgrad(DType dtype, Sampling sampling, const Gather& g, const void* dz,
                          const void* x, void* dw, const Queue& queue);
void grouped_channels_wgrad(DType dtype, Sampling sampling, const Gather& g, const void* dz,
                            const void* x, void* dw, const Queue& queue);

}  // namespace torchconv::cuda
