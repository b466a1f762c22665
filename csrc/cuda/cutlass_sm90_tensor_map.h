// Tensor maps that the driver refuses become exceptions. CUTLASS only asserts that it took them,
// and what runs with one that it did not take ends in a fault of the device, which no later call of
// the process survives.
#pragma once

#include <stdexcept>
#include <string>

#include "cutlass/cuda_host_adapter.hpp"

namespace torchconv::cuda::sm90 {

inline CUresult accepted(CUresult result, const char* what) {
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("torchconv: the CUDA driver refuses a tensor map, ") +
                             what + " returned " + std::to_string(static_cast<int>(result)));
  return result;
}

template <typename... Arguments>
CUresult checked_cuTensorMapEncodeTiled(Arguments... arguments) {
  return accepted(cutlass::call_cuTensorMapEncodeTiled(arguments...), "cuTensorMapEncodeTiled");
}

template <typename... Arguments>
CUresult checked_cuTensorMapEncodeIm2col(Arguments... arguments) {
  return accepted(cutlass::call_cuTensorMapEncodeIm2col(arguments...), "cuTensorMapEncodeIm2col");
}

}  // namespace torchconv::cuda::sm90

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) torchconv::cuda::sm90::checked_##function
