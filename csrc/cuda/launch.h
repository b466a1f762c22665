// How a kernel is launched, and what CUDA's headers bring. Every .cu file includes this, and none
// writes <<<...>>>: what tests/emulator puts in the place of CUDA compiles the same sources with
// the C++ compiler and runs them on the CPU, where every thread of a block is a coroutine.
#pragma once

#include <cstdint>

#include "cuda/queue.h"

#ifdef TORCHCONV_EMULATE_CUDA
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <string>

namespace torchconv::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is not sticky must not be reported again by the next call
  throw std::runtime_error(std::string("CUDA error in torchconv's ") + what + ": " +
                           cudaGetErrorString(error));
}

// A kernel's limit of dynamic shared memory is one for all threads of the process: another thread
// must not lower it between this one's call that raises it and its launch.
inline std::mutex shared_memory_limit;

// kernel<<<grid, block, shared_bytes, queue.stream>>>(arguments...), which needs no more dynamic
// shared memory than the device has. Throws what the launch reports. An empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            const Queue& queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  std::unique_lock<std::mutex> lock(shared_memory_limit, std::defer_lock);
  // A block has 48 KB without asking, static memory included, of which kernels have up to 32.
  if (shared_bytes > 16 * 1024) {
    lock.lock();
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// The block's dynamic shared memory, aligned to 128 bytes; one type per kernel.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace torchconv::cuda

#endif
