// Tensor maps that the driver refuses become exceptions. CUTLASS only asserts that it took them,
// and what runs with one that it did not take ends in a fault of the device, which no later call of
// the process survives.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "cutlass/cuda_host_adapter.hpp"

namespace torchconv::cuda::sm90 {

template <typename Encode>
CUresult encoded(const char* what, Encode&& encode) {
  CUresult result = encode();
  // The driver has no context in a thread from which the runtime was never called: autograd's, in
  // the first backward pass of a process.
  int device = 0;
  if (result == CUDA_ERROR_INVALID_CONTEXT && cudaGetDevice(&device) == cudaSuccess &&
      cudaSetDevice(device) == cudaSuccess)
    result = encode();
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string("torchconv: the CUDA driver refuses a tensor map, ") +
                             what + " returned " + std::to_string(static_cast<int>(result)));
  return result;
}

template <typename... Arguments>
CUresult checked_cuTensorMapEncodeTiled(Arguments... arguments) {
  return encoded("cuTensorMapEncodeTiled",
                 [&] { return cutlass::call_cuTensorMapEncodeTiled(arguments...); });
}

template <typename... Arguments>
CUresult checked_cuTensorMapEncodeIm2col(Arguments... arguments) {
  return encoded("cuTensorMapEncodeIm2col",
                 [&] { return cutlass::call_cuTensorMapEncodeIm2col(arguments...); });
}

}  // namespace torchconv::cuda::sm90

#undef CUTLASS_CUDA_DRIVER_WRAPPER_CALL
#define CUTLASS_CUDA_DRIVER_WRAPPER_CALL(function) torchconv::cuda::sm90::checked_##function
