// Depthwise convolution with channels contiguous (NHWC), straight from the image by the kernels of
// microkernels/channel_columns.h: in float32 and bfloat16 of up to kMostColumns columns with
// strides of 1 and 2, or of 3 and 4 by as large a kernel, in others square ones of 3, 5 and 7 taps.
// With a dilation, rows and columns of one residue at a time are an image without. The rest is
// depthwise_channels.h's.
#pragma once

#include "core/conv_problem.h"
#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// One channel and one filter in a group, at least a vector of channels.
template <typename T>
bool depthwise_columns_applies(const ConvView& view);
// The same for square kernels of 3, 5 or 7 taps without dilation, which wgrad and minimal filtering
// ask for.
template <typename T>
bool depthwise_columns_square_applies(const ConvView& view);

// Elements of the packed weights, of float and double.
template <typename T>
int64_t depthwise_columns_weights_size(const ConvView& view);
template <typename T>
void depthwise_columns_pack_weights(const ConvView& view, const T* w, Wide<T>* packed);

// The view applies and is not empty. packed: from depthwise_columns_pack_weights, or null; bias may
// be null.
template <typename T>
void depthwise_columns_gather(const ConvView& view, const T* src, const T* w, const Wide<T>* packed,
                              const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

// view is fprop's. False where any of the gradient is not finite: pixels that no window holds are
// multiplied by zero, which infinity and NaN survive.
template <typename T>
bool depthwise_columns_wgrad(const ConvView& view, const T* dz, const T* x, T* dw,
                             const Parallel& pool);

// dgrad of a stride of 2, all residues at a time. Writes all of dx.
template <typename T>
bool depthwise_columns_spread_applies(const ConvProblem& p);
template <typename T>
void depthwise_columns_spread(const ConvProblem& p, const T* dz, const T* w, T* dx,
                              const Parallel& pool);

}  // namespace torchconv::cpu
