// Kernels that start while the one before them on the stream ends, from Hopper on.
#pragma once

#include "cuda/launch.h"

namespace torchconv::cuda {

// In a kernel of launch_early: waits until what the kernel before it wrote can be read. Before
// that it touches no memory of others.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(TORCHCONV_EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// In the kernel before it: blocks of the next one may start once all of this one's blocks say so.
__device__ __forceinline__ void let_next_start() {
#if !defined(TORCHCONV_EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// launch() for kernels of at most 16 KB of shared memory, or whose limit launch() has raised.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  const Queue& queue, const Arguments&... arguments) {
#ifndef TORCHCONV_EMULATE_CUDA
  if (queue.capability >= 90) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (shared_bytes > 16 * 1024)
      allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(queue.stream);
    config.attrs = &early;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
    return;
  }
#endif
  launch(kernel, grid, block, shared_bytes, queue, arguments...);
}

}  // namespace torchconv::cuda
