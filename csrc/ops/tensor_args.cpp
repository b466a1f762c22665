// The shared half of every operator: see tensor_args.h.

#include "ops/tensor_args.h"

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <stdexcept>

#include "ops/pooled_tensor.h"
#ifndef TORCHCONV_CUDA
#include "ops/cpu/layout_change.h"
#include "ops/execution.h"
#endif

namespace torchconv::ops {

void fail(std::initializer_list<MessagePart> parts) {
  std::string message;
  for (const MessagePart& part : parts)
    if (part.is_number)
      message += std::to_string(part.number);
    else
      message += part.text;
  throw std::runtime_error(message);
}

std::string to_string(IntList values) {
  std::string out = "[";
  for (size_t i = 0; i < values.size(); ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + "]";
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
      fail({"\"", op, "\" not implemented for '", torch::headeronly::toString(type), "'"});
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

bool is_dense(const Tensor& t, Layout layout) {
  static constexpr int kOrder[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  const IntList sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  bool is_dense = true;
  for (const int d : kOrder[layout == Layout::kNHWC]) {
    if (sizes[d] != 1 && strides[d] != expected) is_dense = false;
    expected *= sizes[d];
  }
  return is_dense || expected == 0;
}

Tensor dense(const Tensor& t, Layout layout) {
  if (is_dense(t, layout)) return t;
#ifndef TORCHCONV_CUDA
  if (const auto change = layout_change(t, layout)) {
    const Tensor copy = new_tensor(t, t.sizes(), t.scalar_type(), layout);
    change->run(t.const_data_ptr(), copy.mutable_data_ptr(), torch_threads());
    return copy;
  }
#endif
  return torch::stable::contiguous(t, memory_format(layout));
}

std::array<int64_t, 4> dense_strides(IntList s, Layout layout) {
  if (layout == Layout::kNHWC) return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
  const auto one = [&](int d) { return std::max<int64_t>(s[d], 1); };
  return {one(1) * one(2) * one(3), one(2) * one(3), one(3), 1};
}

namespace {

int64_t bytes_of(IntList sizes, int32_t type) {
  int64_t bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(type));
  for (size_t d = 0; d < sizes.size(); ++d)
    bytes = checked_mul(bytes, std::max<int64_t>(sizes[d], 1), "tensor size");
  return bytes;
}

int32_t number_of(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// torch::stable::empty would go through the dispatcher, by name, and take longer.
Tensor empty_strided(const Tensor& like, IntList sizes, const int64_t* strides, int32_t type) {
  int32_t device = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides, type, device, like.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

}  // namespace

Tensor new_tensor(const Tensor& like, IntList sizes, ScalarType dtype, Layout layout) {
  const int32_t type = number_of(dtype);
  [[maybe_unused]] const int64_t bytes = bytes_of(sizes, type);  // also checks that they fit
  const auto strides = dense_strides(sizes, layout);
#ifndef TORCHCONV_CUDA
  if (AtenTensorHandle pooled = pooled_tensor(like, sizes, strides.data(), type, bytes))
    return Tensor(pooled);
#endif
  return empty_strided(like, sizes, strides.data(), type);
}

Tensor new_vector(const Tensor& like, int64_t size, ScalarType dtype) {
  const int64_t stride = 1;
  return empty_strided(like, std::array<int64_t, 1>{size}, &stride, number_of(dtype));
}

Tensor new_vector(const Tensor& like, int64_t size) {
  return new_vector(like, size, like.scalar_type());
}

Tensor no_tensor(const Tensor& like) { return new_vector(like, 0); }

}  // namespace torchconv::ops
