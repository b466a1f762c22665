// Where the work of one call goes: a stream of one device, and memory that it may use meanwhile.
// csrc/ops makes one for each call; the drivers of csrc/cuda hand it down to launch(). Plain C++,
// so that csrc/ops needs no CUDA compiler.
#pragma once

#include <cstdint>

namespace torchconv::cuda {

struct Queue {
  void* stream;         // a cudaStream_t of the current device
  int capability;       // of the device: 10 * major + minor, 90 for Hopper
  int multiprocessors;  // of the device

  // Whether float32 convolution may round its factors to TF32, by PyTorch's own switch.
  bool (*allow_tf32)();
  // Whether convolution may use Winograd's algorithm, by torchconv.backends' switch.
  bool (*allow_winograd)();

  // Uninitialised device memory, aligned to 256 bytes, which is ours until the work that this call
  // has queued is done. Throws where there is none left.
  void* (*allocate)(void* context, int64_t bytes);
  void* context;

  template <typename T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(context, count * static_cast<int64_t>(sizeof(T))));
  }
};

}  // namespace torchconv::cuda
