// From torch's tensors to what a kernel takes, and back: element type, layout, dense memory, new
// outputs, errors. Everything here goes through LibTorch's stable ABI, so that one binary serves
// every PyTorch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "core/types.h"

namespace torchconv::ops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using IntList = torch::headeronly::IntHeaderOnlyArrayRef;

// A part of a message: text or a whole number.
struct MessagePart {
  MessagePart(const char* t) : text(t) {}
  MessagePart(const std::string& t) : text(t) {}
  template <typename Integer, typename = std::enable_if_t<std::is_integral_v<Integer>>>
  MessagePart(Integer n) : number(static_cast<int64_t>(n)), is_number(true) {}

  std::string_view text;
  int64_t number = 0;
  bool is_number = false;
};

// RuntimeError in Python, with the message alone. Put together without streams: a stream's locale
// is shared with the process's C++ library even where this one was linked with its own.
[[noreturn]] void fail(std::initializer_list<MessagePart> parts);

// The message is in PyTorch's words with the actual values, and is put together only on failure.
#define TORCHCONV_CHECK(condition, ...)                                               \
  do {                                                                                \
    if (__builtin_expect(!(condition), false)) ::torchconv::ops::fail({__VA_ARGS__}); \
  } while (false)

// "[2, 3]", as Python prints a list.
std::string to_string(IntList values);

// Products and sums of sizes that a user may choose near 2^60: RuntimeError instead of overflow.
int64_t checked_mul(int64_t a, int64_t b, const char* what);
int64_t checked_add(int64_t a, int64_t b, const char* what);

// The (h, w) of a parameter that the schema declares as [2].
std::array<int64_t, 2> pair(IntList values, const char* name);

DType dtype_of(const Tensor& t, const char* op);
ScalarType scalar_type_of(DType dtype);

// PyTorch's Tensor::suggest_memory_format for a 4D tensor.
Layout suggested_layout(const Tensor& t);

constexpr MemoryFormat memory_format(Layout layout) {
  return layout == Layout::kNHWC ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// Whether an image's elements follow each other in this layout.
bool is_dense(const Tensor& t, Layout layout);
// t itself where it is dense in this layout, else a dense copy.
Tensor dense(const Tensor& t, Layout layout);

// As torch.empty has them: a size of zero counts as one, but not in channels_last.
std::array<int64_t, 4> dense_strides(IntList sizes, Layout layout);

// Uninitialised, on the device of like.
Tensor new_tensor(const Tensor& like, IntList sizes, ScalarType dtype, Layout layout);

// Uninitialised, of like's or another type and on its device.
Tensor new_vector(const Tensor& like, int64_t size);
Tensor new_vector(const Tensor& like, int64_t size, ScalarType dtype);

// What stands for a gradient nobody asked for: no elements.
Tensor no_tensor(const Tensor& like);

}  // namespace torchconv::ops
