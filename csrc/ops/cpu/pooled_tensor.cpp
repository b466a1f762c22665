// Outputs of the CPU's operators in memory of the pool: see pooled_tensor.h.

#include "ops/pooled_tensor.h"

#include <dlfcn.h>

#include <atomic>

#include "core/memory_pool.h"

namespace torchconv::ops {
namespace {

// torch_from_blob of PyTorch 2.11, looked up because the library must also load in 2.10.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t,
                                    int32_t, int32_t, int32_t, AtenTensorHandle*, int32_t,
                                    const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob_with_deleter() {
  static const FromBlob function =
      reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

// bound/growth.cpp's torchconv_let_grow. Null where its library is not there, or was built for
// another PyTorch: then a tensor in memory of the pool refuses to grow.
std::atomic<void (*)(void* tensor)> let_grow{nullptr};

}  // namespace

// For torchconv/_load.py, through ctypes.
extern "C" __attribute__((visibility("default"))) void torchconv_set_let_grow(
    void (*function)(void* tensor)) {
  let_grow = function;
}

AtenTensorHandle pooled_tensor(const Tensor& like, IntList sizes, const int64_t* strides,
                               int32_t type, int64_t bytes) {
  const FromBlob from_blob = from_blob_with_deleter();
  if (from_blob == nullptr || !like.is_cpu()) return nullptr;
  void* block = memory_pool::allocate(bytes);
  if (block == nullptr) return nullptr;
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error = from_blob(
      block, 4, sizes.data(), strides, 0, type, aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { memory_pool::release(data); }, nullptr);
  if (error != AOTI_TORCH_SUCCESS) {
    memory_pool::release(block);
    return nullptr;
  }
  if (const auto function = let_grow.load()) function(handle);
  return handle;
}

}  // namespace torchconv::ops
