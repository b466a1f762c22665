// Any convolution pass from a tap list to a strided destination (fprop, one phase of dgrad), as a
// matrix product whose operands are packed on the fly.
#pragma once

#include "core/parallel.h"
#include "cpu/activation.h"
#include "cpu/conv_view.h"

namespace torchconv::cpu {

// The grid must not be empty; the terms may be. bias may be null. Instantiated for float, double,
// BFloat16 and Float16.
template <typename T>
void implicit_gemm(const ConvView& view, const T* src, const T* w, const T* bias,
                   const Epilogue<T>& epilogue, const Parallel& pool);

}  // namespace torchconv::cpu
