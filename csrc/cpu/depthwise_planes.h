// Depthwise convolution with pixels contiguous (NCHW) by square kernels of 2 to 7 taps, strides of
// 1 (3, 5 and 7 taps with any dilation) to 4: straight from the image by the kernels of
// microkernels/plane_rows.h, with no copy but for conversion.
#pragma once

#include <vector>

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// One source channel in a group; any number of filters.
bool depthwise_planes_applies(const ConvView& view);
// The same of a kernel whose rows roll on in registers.
bool depthwise_planes_rolls(const ConvView& view);

// The view applies and is not empty. bias may be null.
template <typename T>
void depthwise_planes_gather(const ConvView& view, const T* src, const T* w, const T* bias,
                             const Epilogue<T>& epilogue, const Parallel& pool);

// The same with kernels of 5 and 7 taps and a stride of 1 by the minimal filtering of
// microkernels/plane_rows_winograd.h, where a processor does half a vector at a time. Returns the
// samples whose outputs are not to be trusted.
bool depthwise_planes_winograd_applies(const ConvView& view);
std::vector<int64_t> depthwise_planes_winograd(const ConvView& view, const float* src,
                                               const float* w, const float* bias,
                                               const Epilogue<float>& epilogue,
                                               const Parallel& pool);

// Kernels whose rows roll, and those with few pixels in common. view is fprop's. False where any of
// the gradient is not finite: padding is multiplied by dz, which infinity and NaN survive.
bool depthwise_planes_wgrad_applies(const ConvView& view);
template <typename T>
bool depthwise_planes_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                            const Parallel& pool);

// dgrad of a stride of 2, all residues at a time. Writes all of dx.
bool depthwise_planes_spread_applies(const ConvProblem& p);
template <typename T>
void depthwise_planes_spread(const ConvProblem& p, const T* dz, const T* w, T* dx,
                             const Parallel& pool);

}  // namespace torchconv::cpu
