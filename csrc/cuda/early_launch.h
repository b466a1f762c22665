// Launches that overlap: on Hopper and later, of code that was compiled for it, a kernel starts
// while the one before it in the stream ends, in the places that its blocks leave, and waits there
// until its results can be seen. That saves what the start of a kernel takes, a large part of a
// short one's time.
#pragma once

#include "cuda/launch.h"

namespace torchconv::cuda {

// In a kernel of launch_early, by each thread, before it reads or writes what other kernels do:
// waits until the kernel before has ended.
__device__ __forceinline__ void wait_for_previous() {
#if !defined(TORCHCONV_EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once all blocks of this one have said so, or ended.
__device__ __forceinline__ void let_next_start() {
#if !defined(TORCHCONV_EMULATE_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Both, for kernels in a row.
__device__ __forceinline__ void begin_early() {
  let_next_start();
  wait_for_previous();
}

#ifdef TORCHCONV_EMULATE_CUDA

// Kernels run one after another.
template <typename... Parameters, typename... Arguments>
void launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes,
                  const Queue& queue, const Arguments&... arguments) {
  launch(kernel, grid, block, shared_bytes, queue, arguments...);
}

#else

inline bool may_start_early(const Queue& queue) { return queue.capability >= 90; }

inline cudaLaunchAttribute starts_early() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Whether wait_for_previous() waits in the kernel as the current device runs it: other devices may
// run what was compiled for an older architecture.
inline bool waits_for_previous(const void* kernel) {
  static thread_local std::unordered_map<uint64_t, bool> known;
  const auto [found, is_new] = known.try_emplace(key_of(kernel), false);
  if (is_new) {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "kernel's attributes");
    found->second = attributes.ptxVersion >= 90;
  }
  return found->second;
}

// As launch(), of a kernel that calls wait_for_previous() first.
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
  const bool early =
      may_start_early(queue) && waits_for_previous(reinterpret_cast<const void*>(kernel));
  config.numAttrs = early ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

#endif

}  // namespace torchconv::cuda
