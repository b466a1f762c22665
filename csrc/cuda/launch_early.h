// Launches that overlap: a kernel starts while the one before it in the stream ends, and waits
// there until that one's results can be seen. It saves what the start of a kernel takes, which is a
// large part of a short one's time.
#pragma once

#include "cuda/launch.h"

namespace torchconv::cuda {

#ifdef TORCHCONV_EMULATE_CUDA

// Kernels run one after another.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  const Queue& queue, const Arguments&... arguments) {
  launch(kernel, grid, block, shared_bytes, queue, arguments...);
}
inline void begin_early() {}

#else

// What lets a kernel start while the one before it in the stream ends, on Hopper and later: its
// blocks take the places that blocks of the other leave, and wait there before they touch memory.
inline cudaLaunchAttribute starts_early() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}
inline bool may_start_early(const Queue& queue) { return queue.capability >= 90; }

// As launch(), of a kernel that calls begin_early() first.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  const Queue& queue, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 16 * 1024)
    allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
  cudaLaunchAttribute attribute = starts_early();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &attribute;
  config.numAttrs = may_start_early(queue) ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// Lets the kernel after this one start early too, and waits until the one before it has ended and
// its results are there. Of each thread, before it reads or writes what other kernels do.
__device__ __forceinline__ void begin_early() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

#endif

}  // namespace torchconv::cuda
