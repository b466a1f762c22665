// The pooling operators: check once, allocate, describe one PoolProblem, call the kernels.

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/pool_problem.h"
#include "ops/backend.h"
#include "ops/chain.h"
#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {
namespace {

struct PoolArguments {
  IntList kernel_size, stride, padding, dilation;
  bool ceil_mode = false;
  bool count_include_pad = true;
  std::optional<int64_t> divisor = std::nullopt;
};

constexpr std::array<int64_t, 2> kNoDilation{1, 1};
constexpr int64_t kMaxWindow = std::numeric_limits<int32_t>::max();  // the widest offset type

// One axis of the output, PyTorch's rule: with ceil_mode a last, partial window counts as long as
// it starts inside the image or the padding before it.
int64_t output_size(int64_t size, int64_t kernel, int64_t pad, int64_t stride, int64_t dilation,
                    bool ceil_mode) {
  const int64_t free = size - (dilation * (kernel - 1) + 1 - 2 * pad);
  const int64_t rounded = free + (ceil_mode ? stride - 1 : 0);
  if (rounded < 0) return 0;
  const int64_t out = rounded / stride + 1;
  return ceil_mode && (out - 1) * stride >= size + pad ? out - 1 : out;
}

// Window, stride, padding and dilation of an (N, C, H, W) input. P, Q and the rest are left to the
// callers. PyTorch holds these values in a C int and refuses larger ones; so do we, and no product
// or sum of them with a tensor's size can overflow.
PoolProblem describe(IntList sizes, DType dtype, Layout layout, const PoolArguments& a) {
  PoolProblem p{};
  p.N = sizes[0], p.C = sizes[1], p.H = sizes[2], p.W = sizes[3];
  for (const IntList list : {a.kernel_size, a.stride, a.padding, a.dilation})
    for (const int64_t v : list)
      TORCHCONV_CHECK(
          v >= std::numeric_limits<int32_t>::min() && v <= std::numeric_limits<int32_t>::max(),
          "value cannot be converted to type int without overflow: ", v);
  const auto [R, S] = pair(a.kernel_size, "kernel_size");
  const auto [stride_h, stride_w] = pair(a.stride, "stride");
  const auto [pad_h, pad_w] = pair(a.padding, "padding");
  const auto [dilation_h, dilation_w] = pair(a.dilation, "dilation");
  TORCHCONV_CHECK(R > 0 && S > 0, "kernel size should be greater than zero, but got kH: ", R,
                  " kW: ", S);
  TORCHCONV_CHECK(stride_h != 0 && stride_w != 0,
                  "stride should not be zero, but got dH: ", stride_h, " dW: ", stride_w);
  TORCHCONV_CHECK(stride_h > 0 && stride_w > 0,
                  "stride should be greater than zero, but got dH: ", stride_h, " dW: ", stride_w);
  TORCHCONV_CHECK(dilation_h > 0 && dilation_w > 0,
                  "dilation should be greater than zero, but got dilationH: ", dilation_h,
                  " dilationW: ", dilation_w);
  TORCHCONV_CHECK(pad_h >= 0 && pad_w >= 0,
                  "pad must be non-negative, but got pad: ", std::min(pad_h, pad_w));
  const auto check_half = [](int64_t pad, int64_t kernel, int64_t dilation) {
    TORCHCONV_CHECK(pad <= (dilation * (kernel - 1) + 1) / 2,
                    "pad should be at most half of effective kernel size, but got pad=", pad,
                    ", kernel_size=", kernel, " and dilation=", dilation);
  };
  check_half(pad_h, R, dilation_h);
  check_half(pad_w, S, dilation_w);
  p.R = R, p.S = S;
  p.stride_h = stride_h, p.stride_w = stride_w;
  p.pad_h = pad_h, p.pad_w = pad_w;
  p.dilation_h = dilation_h, p.dilation_w = dilation_w;
  p.dtype = dtype;
  p.layout = layout;
  p.count_include_pad = a.count_include_pad;
  if (a.divisor.has_value()) {
    TORCHCONV_CHECK(*a.divisor != 0, "divisor must be not zero, but got divisor_override=0");
    p.divisor = *a.divisor;
  }
  return p;
}

PoolProblem describe(const Tensor& input, const char* op, const PoolArguments& a) {
  const IntList x = input.sizes();
  TORCHCONV_CHECK(x.size() == 4 && x[1] > 0 && x[2] > 0 && x[3] > 0,
                  "Expected 3D or 4D (batch mode) tensor with optional 0 dim batch size for input, "
                  "but got:",
                  to_string(x));
  PoolProblem p = describe(x, dtype_of(input, op), suggested_layout(input), a);
  p.P = output_size(p.H, p.R, p.pad_h, p.stride_h, p.dilation_h, a.ceil_mode);
  p.Q = output_size(p.W, p.S, p.pad_w, p.stride_w, p.dilation_w, a.ceil_mode);
  TORCHCONV_CHECK(p.P > 0 && p.Q > 0, "Given input size: (", p.C, "x", p.H, "x", p.W,
                  "). Calculated output size: (", p.C, "x", p.P, "x", p.Q,
                  "). Output size is too small");
  return p;
}

// A backward knows the input's size but not the input: P and Q come from the gradient.
PoolProblem describe_backward(const Tensor& grad_output, IntList input_size, const char* op,
                              const PoolArguments& a, bool channels_last) {
  const IntList dy = grad_output.sizes();
  TORCHCONV_CHECK(
      dy.size() == 4 && input_size.size() == 4 && dy[0] == input_size[0] && dy[1] == input_size[1],
      op, ": grad_output of size ", to_string(dy), " does not belong to an input of size ",
      to_string(input_size));
  PoolProblem p = describe(input_size, dtype_of(grad_output, op),
                           channels_last ? Layout::kNHWC : Layout::kNCHW, a);
  p.P = dy[2], p.Q = dy[3];
  const auto fits = [](int64_t out, int64_t in, int64_t k, int64_t pad, int64_t stride, int64_t d) {
    return out == output_size(in, k, pad, stride, d, false) ||
           out == output_size(in, k, pad, stride, d, true);
  };
  TORCHCONV_CHECK(fits(p.P, p.H, p.R, p.pad_h, p.stride_h, p.dilation_h) &&
                      fits(p.Q, p.W, p.S, p.pad_w, p.stride_w, p.dilation_w),
                  op, ": grad_output of size ", to_string(dy),
                  " does not belong to an input of size ", to_string(input_size));
  return p;
}

std::array<int64_t, 4> output_sizes(const PoolProblem& p) { return {p.N, p.C, p.P, p.Q}; }
std::array<int64_t, 4> input_sizes(const PoolProblem& p) { return {p.N, p.C, p.H, p.W}; }

enum class Remember { kNothing, kOffsets, kIndices };

// Maximum or minimum, and what was selected. The second tensor is absent for kNothing.
std::tuple<Tensor, std::optional<Tensor>> select(Select which, Remember remember,
                                                 const Tensor& input, const PoolArguments& a,
                                                 [[maybe_unused]] Repeat* repeat = nullptr) {
  const PoolProblem p = describe(input, which == Select::kMax ? "max_pool2d" : "min_pool2d", a);
  const Execution run(input);
  const Tensor x = dense(input, p.layout);
  const auto sizes = output_sizes(p);
  Tensor y = new_tensor(input, sizes, input.scalar_type(), p.layout);
  std::optional<Tensor> selected;
  TORCHCONV_CHECK(remember == Remember::kNothing || p.R <= kMaxWindow / p.S,
                  "max and min pooling that remembers what it selects takes windows of up to ",
                  kMaxWindow, " elements, but got kernel_size=", to_string(a.kernel_size));
  if (remember != Remember::kNothing) {
    const DType type = remember == Remember::kIndices ? DType::kInt64 : offset_dtype(p.R, p.S);
    selected = new_tensor(input, sizes, scalar_type_of(type), p.layout);
  }
  void* memory = selected ? selected->mutable_data_ptr() : nullptr;
  kernels::select_pool2d(p, which, x.const_data_ptr(), y.mutable_data_ptr(),
                         remember == Remember::kOffsets ? memory : nullptr,
                         remember == Remember::kIndices ? static_cast<int64_t*>(memory) : nullptr,
                         run);
#ifndef TORCHCONV_CUDA
  if (repeat != nullptr && x.get() == input.get())
    *repeat = [p, which](const StepMemory& m) {
      kernels::select_pool2d(p, which, m.tensors[0], m.result, nullptr, nullptr, torch_threads());
    };
#endif
  return {y, selected};
}

template <Select which>
Tensor select_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                     IntList dilation, bool ceil_mode) {
  const PoolArguments a{kernel_size, stride, padding, dilation, ceil_mode};
  return std::get<0>(select(which, Remember::kNothing, input, a));
}

template <Select which, Remember remember>
std::tuple<Tensor, Tensor> select_pool2d_with(const Tensor& input, IntList kernel_size,
                                              IntList stride, IntList padding, IntList dilation,
                                              bool ceil_mode) {
  const PoolArguments a{kernel_size, stride, padding, dilation, ceil_mode};
  auto [y, selected] = select(which, remember, input, a);
  return {y, *selected};
}

Selected selected_kind(const PoolProblem& p, const Tensor& selected, const Tensor& output,
                       const char* op) {
  const IntList want = output.sizes(), got = selected.sizes();
  TORCHCONV_CHECK(want.size() == got.size() && std::equal(want.begin(), want.end(), got.begin()),
                  op, ": expected selected of size ", to_string(want), ", but got ",
                  to_string(got));
  TORCHCONV_CHECK(selected.device() == output.device(), op,
                  ": expected all tensors on the same device");
  if (selected.scalar_type() == ScalarType::Long) return Selected::kIndex64;
  const DType type = offset_dtype(p.R, p.S);
  TORCHCONV_CHECK(selected.scalar_type() == scalar_type_of(type), op, ": a window of ", p.R, " x ",
                  p.S, " has offsets of type ", torch::headeronly::toString(scalar_type_of(type)),
                  " or indices of type Long, but got ",
                  torch::headeronly::toString(selected.scalar_type()));
  return type == DType::kUInt8    ? Selected::kOffset8
         : type == DType::kUInt16 ? Selected::kOffset16
                                  : Selected::kOffset32;
}

void check_gradient_type(const PoolProblem& p, const Tensor& t, const char* op) {
  TORCHCONV_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ||
                      p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
                  "\"", op, "\" not implemented for '",
                  torch::headeronly::toString(t.scalar_type()), "'");
}

Tensor select_pool2d_backward(const Tensor& grad_output, const Tensor& selected, IntList input_size,
                              IntList kernel_size, IntList stride, IntList padding,
                              IntList dilation, bool channels_last) {
  constexpr const char* kOp = "select_pool2d_backward";
  const PoolProblem p = describe_backward(grad_output, input_size, kOp,
                                          {kernel_size, stride, padding, dilation}, channels_last);
  check_gradient_type(p, grad_output, kOp);
  const Selected kind = selected_kind(p, selected, grad_output, kOp);
  const Execution run(grad_output);
  const Tensor dy = dense(grad_output, p.layout), chosen = dense(selected, p.layout);
  Tensor dx = new_tensor(grad_output, input_sizes(p), grad_output.scalar_type(), p.layout);
  kernels::select_pool2d_backward(p, kind, dy.const_data_ptr(), chosen.const_data_ptr(),
                                  dx.mutable_data_ptr(), run);
  return dx;
}

Tensor select_pool2d_gather(const Tensor& input, const Tensor& selected, IntList kernel_size,
                            IntList stride, IntList padding, IntList dilation) {
  constexpr const char* kOp = "select_pool2d_gather";
  PoolProblem p =
      describe_backward(selected, input.sizes(), kOp, {kernel_size, stride, padding, dilation},
                        suggested_layout(input) == Layout::kNHWC);
  p.dtype = dtype_of(input, kOp);
  const Selected kind = selected_kind(p, selected, selected, kOp);
  TORCHCONV_CHECK(selected.device() == input.device(), kOp,
                  ": expected all tensors on the same device");
  const Execution run(input);
  const Tensor x = dense(input, p.layout), chosen = dense(selected, p.layout);
  Tensor y = new_tensor(input, output_sizes(p), input.scalar_type(), p.layout);
  kernels::select_pool2d_gather(p, kind, x.const_data_ptr(), chosen.const_data_ptr(),
                                y.mutable_data_ptr(), run);
  return y;
}

Tensor avg_pool2d_with(const Tensor& input, [[maybe_unused]] Repeat* repeat, IntList kernel_size,
                       IntList stride, IntList padding, bool ceil_mode, bool count_include_pad,
                       std::optional<int64_t> divisor_override) {
  constexpr const char* kOp = "avg_pool2d";
  const PoolArguments a{kernel_size,       stride,          padding, kNoDilation, ceil_mode,
                        count_include_pad, divisor_override};
  const PoolProblem p = describe(input, kOp, a);
  check_gradient_type(p, input, kOp);
  const Execution run(input);
  const Tensor x = dense(input, p.layout);
  Tensor y = new_tensor(input, output_sizes(p), input.scalar_type(), p.layout);
  kernels::avg_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(), run);
#ifndef TORCHCONV_CUDA
  if (repeat != nullptr && x.get() == input.get())
    *repeat = [p](const StepMemory& m) {
      kernels::avg_pool2d(p, m.tensors[0], m.result, torch_threads());
    };
#endif
  return y;
}

Tensor avg_pool2d(const Tensor& input, IntList kernel_size, IntList stride, IntList padding,
                  bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor_override) {
  return avg_pool2d_with(input, nullptr, kernel_size, stride, padding, ceil_mode, count_include_pad,
                         divisor_override);
}

Tensor avg_pool2d_backward(const Tensor& grad_output, IntList input_size, IntList kernel_size,
                           IntList stride, IntList padding, bool ceil_mode, bool count_include_pad,
                           std::optional<int64_t> divisor_override, bool channels_last) {
  constexpr const char* kOp = "avg_pool2d_backward";
  const PoolArguments a{kernel_size,       stride,          padding, kNoDilation, ceil_mode,
                        count_include_pad, divisor_override};
  const PoolProblem p = describe_backward(grad_output, input_size, kOp, a, channels_last);
  check_gradient_type(p, grad_output, kOp);
  const Execution run(grad_output);
  const Tensor dy = dense(grad_output, p.layout);
  Tensor dx = new_tensor(grad_output, input_sizes(p), grad_output.scalar_type(), p.layout);
  kernels::avg_pool2d_backward(p, dy.const_data_ptr(), dx.mutable_data_ptr(), run);
  return dx;
}

#ifndef TORCHCONV_CUDA
Tensor max_pool2d_with(const Tensor& input, Repeat* repeat, IntList kernel_size, IntList stride,
                       IntList padding, IntList dilation, bool ceil_mode) {
  const PoolArguments a{kernel_size, stride, padding, dilation, ceil_mode};
  return std::get<0>(select(Select::kMax, Remember::kNothing, input, a, repeat));
}
#endif

}  // namespace

#ifndef TORCHCONV_CUDA
Tensor max_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat) {
  return with_next_settings<&max_pool2d_with>(reader, input, repeat);
}

Tensor avg_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat) {
  return with_next_settings<&avg_pool2d_with>(reader, input, repeat);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(torchconv, TORCHCONV_KEY, m) {
  constexpr auto kOffsets = Remember::kOffsets, kIndices = Remember::kIndices;
  implement<&select_pool2d<Select::kMax>, Tensor>(m, "max_pool2d");
  implement<&select_pool2d<Select::kMin>, Tensor>(m, "min_pool2d");
  implement<&select_pool2d_with<Select::kMax, kOffsets>, Tensor>(m, "max_pool2d_with_offsets");
  implement<&select_pool2d_with<Select::kMin, kOffsets>, Tensor>(m, "min_pool2d_with_offsets");
  implement<&select_pool2d_with<Select::kMax, kIndices>, Tensor>(m, "max_pool2d_with_indices");
  implement<&select_pool2d_with<Select::kMin, kIndices>, Tensor>(m, "min_pool2d_with_indices");
  implement<&select_pool2d_backward, Tensor, Tensor>(m, "select_pool2d_backward");
  m.impl("select_pool2d_gather", TORCH_BOX(&select_pool2d_gather));
  implement<&avg_pool2d, Tensor>(m, "avg_pool2d");
  implement<&avg_pool2d_backward, Tensor>(m, "avg_pool2d_backward");
}

}  // namespace torchconv::ops
