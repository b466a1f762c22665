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
#include <unordered_map>

namespace torchconv::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is not sticky must not be reported again by the next call
  throw std::runtime_error(std::string("CUDA error in torchconv's ") + what + ": " +
                           cudaGetErrorString(error));
}

// What kernels have been allowed of dynamic shared memory, each on each device. It is one limit for
// all threads of the process, and only ever raised: what a thread has seen allowed stays so.
struct SharedMemoryLimits {
  std::mutex mutex;
  std::unordered_map<uint64_t, int> bytes;
};
inline SharedMemoryLimits shared_memory_limits;
inline thread_local std::unordered_map<uint64_t, int> shared_memory_seen;

// Of a kernel on the current device.
inline uint64_t key_of(const void* kernel) {
  int device = 0;
  check(cudaGetDevice(&device), "device");
  // Addresses take 48 bits.
  return reinterpret_cast<uintptr_t>(kernel) | static_cast<uint64_t>(device) << 48;
}

inline void allow_shared_memory(const void* kernel, int bytes) {
  const uint64_t key = key_of(kernel);
  int& seen = shared_memory_seen[key];
  if (seen >= bytes) return;
  const std::lock_guard<std::mutex> lock(shared_memory_limits.mutex);
  int& allowed = shared_memory_limits.bytes[key];
  if (allowed < bytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory");
    allowed = bytes;
  }
  seen = allowed;
}

// kernel<<<grid, block, shared_bytes, queue.stream>>>(arguments...), which needs no more dynamic
// shared memory than the device has. Throws what the launch reports. An empty grid is no launch.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
            const Queue& queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  // A block has 48 KB without asking, static memory included, of which kernels have up to 32.
  if (shared_bytes > 16 * 1024)
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
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
