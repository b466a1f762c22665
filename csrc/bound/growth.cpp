// Lets a tensor over memory of the pool grow in place: PyTorch then moves it to memory of its own,
// as it does with every tensor that grows, and the pool gets its block back.
//
// LibTorch's stable ABI makes no such tensor. So this file alone uses PyTorch's C++ API, and is a
// library of its own, which only the very PyTorch that it was compiled with may open:
// torchconv/_load.py sees to that, and hands the function to ops/tensor_args.cpp.
#include <ATen/core/TensorBase.h>
#include <c10/core/CPUAllocator.h>

// handle: an AtenTensorHandle, which is an at::Tensor*, of a tensor that owns its storage alone.
extern "C" __attribute__((visibility("default"))) void torchconv_let_grow(void* handle) {
  const at::TensorBase& tensor = at::get_tensor_base(*static_cast<const at::Tensor*>(handle));
  c10::StorageImpl* const storage = tensor.storage().unsafeGetStorageImpl();
  storage->set_allocator(c10::GetCPUAllocator());
  storage->set_resizable(true);
}
