// Convolution from a tap list (fprop, a phase of dgrad) over bands of rows: depthwise, grouped with
// few channels, and dense where pixels are neighbours in memory.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_band.h"

namespace torchconv::cpu {

// The problem must not be empty and band must fit. bias may be null. Instantiated for float,
// double, BFloat16 and Float16.
template <typename T>
void band_gather(const ConvView& view, const ConvBand& band, const T* src, const T* w,
                 const T* bias, const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
