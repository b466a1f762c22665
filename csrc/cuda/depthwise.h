// The kernels behind the depthwise_* functions of conv_passes.h; depthwise.cu chooses.
#pragma once

#include "cuda/gather.h"

namespace torchconv::cuda {

// fprop and dgrad by small square kernels, pixels contiguous; any number of filters a channel.
void depthwise_planes(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                      const void* w, const void* bias, void* out, void* preactivation,
                      Activation activation, const Queue& queue);

// The same with channels contiguous. False, and nothing done, where channels or pointers are no
// multiples of 16 bytes or a channel has several filters.
bool depthwise_channels(DType dtype, int64_t R, Sampling sampling, const Gather& g, const void* in,
                        const void* w, const void* bias, void* out, void* preactivation,
                        Activation activation, const Queue& queue);

// fprop and dgrad of any kernel, stride and layout.
void depthwise_taps(const ConvProblem& p, Pass pass, const void* in, const void* w,
                    const void* bias, void* out, void* preactivation, const Queue& queue);

// wgrad by the same kernels; sampling and g are fprop's.
void depthwise_planes_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                            const void* dz, const void* x, void* dw, const Queue& queue);
bool depthwise_channels_wgrad(DType dtype, int64_t R, Sampling sampling, const Gather& g,
                              const void* dz, const void* x, void* dw, const Queue& queue);
void depthwise_taps_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                          const Queue& queue);

}  // namespace torchconv::cuda
