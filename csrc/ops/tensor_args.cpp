// The shared half of every operator: see tensor_args.h.

#include "ops/tensor_args.h"

#include <dlfcn.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>

#include "core/memory_pool.h"

namespace torchconv::ops {

std::string to_string(IntList values) {
  std::ostringstream out;
  out << '[';
  for (size_t i = 0; i < values.size(); ++i) out << (i ? ", " : "") << values[i];
  out << ']';
  return out.str();
}

int64_t checked_mul(int64_t a, int64_t b, const char* what) {
  int64_t product;
  TORCHCONV_CHECK(!__builtin_mul_overflow(a, b, &product), what, " overflows: ", a, " * ", b,
                  " does not fit in 64 bits");
  return product;
}

int64_t checked_add(int64_t a, int64_t b, const char* what) {
  int64_t sum;
  TORCHCONV_CHECK(!__builtin_add_overflow(a, b, &sum), what, " overflows: ", a, " + ", b,
                  " does not fit in 64 bits");
  return sum;
}

std::array<int64_t, 2> pair(IntList values, const char* name) {
  TORCHCONV_CHECK(values.size() == 2, "expected ", name, " to be a list of 2 values, but got ",
                  name, "=", to_string(values));
  return {values[0], values[1]};
}

DType dtype_of(const Tensor& t, const char* op) {
  const ScalarType type = t.scalar_type();
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return DType::kUInt8;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::UInt16:
      return DType::kUInt16;
    default:
      fail('"', op, "\" not implemented for '", torch::headeronly::toString(type), "'");
  }
}

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kUInt8:
      return ScalarType::Byte;
    case DType::kInt8:
      return ScalarType::Char;
    case DType::kInt16:
      return ScalarType::Short;
    case DType::kInt32:
      return ScalarType::Int;
    case DType::kInt64:
      return ScalarType::Long;
    case DType::kUInt16:
      return ScalarType::UInt16;
  }
  return ScalarType::Float;
}

Layout suggested_layout(const Tensor& t) {
  const IntList sizes = t.sizes(), strides = t.strides();
  if (sizes.size() != 4 || strides[1] == 0) return Layout::kNCHW;
  int64_t smallest = 0;
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < smallest) return Layout::kNCHW;
    // Sizes of one make N x 1 x 1 x 1 and the like look like both formats: then it is contiguous.
    if (d == 0 && smallest == strides[1]) return Layout::kNCHW;
    smallest = strides[d];
    if (sizes[d] > 1) smallest *= sizes[d];
  }
  return Layout::kNHWC;
}

Tensor dense(const Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  const IntList sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  bool is_dense = true;
  for (const int d : kOrder[layout == Layout::kNHWC]) {
    if (sizes[d] != 1 && strides[d] != expected) is_dense = false;
    expected *= sizes[d];
  }
  return is_dense || expected == 0 ? t : torch::stable::contiguous(t, memory_format(layout));
}

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

// growth/growth.cpp's torchconv_let_grow. Null where its library is not there, or was built for
// another PyTorch: then a tensor in memory of the pool refuses to grow.
std::atomic<void (*)(void* tensor)> let_grow{nullptr};

// As torch.empty has them: a size of zero counts as one, but not in channels_last.
std::array<int64_t, 4> dense_strides(IntList s, Layout layout) {
  if (layout == Layout::kNHWC) return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
  const auto one = [&](int d) { return std::max<int64_t>(s[d], 1); };
  return {one(1) * one(2) * one(3), one(2) * one(3), one(3), 1};
}

int64_t bytes_of(IntList sizes, int32_t type) {
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(type));
  for (size_t d = 0; d < sizes.size(); ++d)
    bytes = checked_mul(bytes, std::max<int64_t>(sizes[d], 1), "tensor size");
  return bytes;
}

// In memory of the pool; null where the pool has none to give.
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

}  // namespace

// For torchconv/_load.py, through ctypes.
extern "C" __attribute__((visibility("default"))) void torchconv_set_let_grow(
    void (*function)(void* tensor)) {
  let_grow = function;
}

Tensor new_tensor(const Tensor& like, IntList sizes, ScalarType dtype, Layout layout) {
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int64_t bytes = bytes_of(sizes, type);
  const auto strides = dense_strides(sizes, layout);
  AtenTensorHandle handle = pooled_tensor(like, sizes, strides.data(), type, bytes);
  if (handle == nullptr) {
    // torch::stable::empty would go through the dispatcher, by name, and take longer.
    int32_t device = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), type, device,
                                                    like.get_device_index(), &handle));
  }
  return Tensor(handle);
}

Tensor no_tensor(const Tensor& like) {
  return torch::stable::empty(std::array<int64_t, 1>{0}, like.scalar_type(), std::nullopt,
                              like.device());
}

Parallel torch_threads() {
  return {[](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  }};
}

}  // namespace torchconv::ops
