// The adaptive pooling operators: check once, allocate, describe one AdaptiveProblem, call the
// kernels. Messages are in PyTorch's words.

#include <algorithm>
#include <limits>
#include <tuple>

#include "ops/backend.h"
#include "ops/chain.h"
#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {
namespace {

AdaptiveProblem describe(const Tensor& like, IntList x, IntList output_size, Layout layout,
                         const char* op) {
  TORCHCONV_CHECK(x.size() == 4, op, "(): Expected 3D or 4D tensor, but got ", to_string(x));
  const auto [P, Q] = pair(output_size, "output_size");
  TORCHCONV_CHECK(P >= 0 && Q >= 0, op,
                  ": elements of output_size must be greater than or equal to 0 but received ",
                  to_string(output_size));
  for (const size_t d : {2, 3})
    TORCHCONV_CHECK(x[d] > 0, op,
                    "(): Expected input to have non-zero size for non-batch dimensions, but input "
                    "has sizes ",
                    to_string(x), " with dimension ", d, " being empty");
  // A window's ends are products of both sizes.
  for (const auto& [in, out] : {std::array{x[2], P}, std::array{x[3], Q}})
    checked_mul(checked_add(in, 1, op), checked_add(out, 1, op), op);
  AdaptiveProblem p{};
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.P = P, p.Q = Q;
  p.dtype = dtype_of(like, op);
  TORCHCONV_CHECK(p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 ||
                      p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16,
                  "\"", op, "\" not implemented for '",
                  torch::headeronly::toString(like.scalar_type()), "'");
  p.layout = layout;
  return p;
}

// A backward knows the input's size but not the input: P and Q come from the gradient.
AdaptiveProblem describe_backward(const Tensor& grad_output, IntList input_size, bool channels_last,
                                  const char* op) {
  const IntList dy = grad_output.sizes();
  TORCHCONV_CHECK(
      dy.size() == 4 && input_size.size() == 4 && dy[0] == input_size[0] && dy[1] == input_size[1],
      op, ": grad_output of size ", to_string(dy), " does not belong to an input of size ",
      to_string(input_size));
  return describe(grad_output, input_size, std::array{dy[2], dy[3]},
                  channels_last ? Layout::kNHWC : Layout::kNCHW, op);
}

void check_indices(const Tensor& indices, const Tensor& other, IntList size, const char* op) {
  const IntList got = indices.sizes();
  TORCHCONV_CHECK(size.size() == got.size() && std::equal(size.begin(), size.end(), got.begin()),
                  op, ": expected indices of size ", to_string(size), ", but got ", to_string(got));
  TORCHCONV_CHECK(indices.scalar_type() == ScalarType::Long, op,
                  ": expected indices of type Long, but got ",
                  torch::headeronly::toString(indices.scalar_type()));
  TORCHCONV_CHECK(indices.device() == other.device(), op,
                  ": expected all tensors on the same device");
}

Tensor new_output(const Tensor& like, const AdaptiveProblem& p, ScalarType dtype) {
  return new_tensor(like, std::array{p.N, p.C, p.P, p.Q}, dtype, p.layout);
}
Tensor new_gradient(const Tensor& like, const AdaptiveProblem& p) {
  return new_tensor(like, std::array{p.N, p.C, p.H, p.W}, like.scalar_type(), p.layout);
}

Tensor adaptive_avg_pool2d_with(const Tensor& input, [[maybe_unused]] Repeat* repeat,
                                IntList output_size) {
  const AdaptiveProblem p =
      describe(input, input.sizes(), output_size, suggested_layout(input), "adaptive_avg_pool2d");
  const Execution run(input);
  const Tensor x = dense(input, p.layout);
  Tensor y = new_output(input, p, input.scalar_type());
  kernels::adaptive_avg_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(), run);
#ifndef TORCHCONV_CUDA
  if (repeat != nullptr && x.get() == input.get())
    *repeat = [p](const StepMemory& m) {
      kernels::adaptive_avg_pool2d(p, m.tensors[0], m.result, torch_threads());
    };
#endif
  return y;
}

Tensor adaptive_avg_pool2d(const Tensor& input, IntList output_size) {
  return adaptive_avg_pool2d_with(input, nullptr, output_size);
}

Tensor adaptive_avg_pool2d_backward(const Tensor& grad_output, IntList input_size,
                                    bool channels_last) {
  const AdaptiveProblem p =
      describe_backward(grad_output, input_size, channels_last, "adaptive_avg_pool2d_backward");
  const Execution run(grad_output);
  const Tensor dy = dense(grad_output, p.layout);
  Tensor dx = new_gradient(grad_output, p);
  kernels::adaptive_avg_pool2d_backward(p, dy.const_data_ptr(), dx.mutable_data_ptr(), run);
  return dx;
}

AdaptiveProblem describe_max(const Tensor& input, IntList output_size) {
  constexpr const char* kOp = "adaptive_max_pool2d";
  const AdaptiveProblem p =
      describe(input, input.sizes(), output_size, suggested_layout(input), kOp);
  TORCHCONV_CHECK(p.C > 0, kOp,
                  "(): Expected input to have non-zero size for non-batch dimensions, but input "
                  "has sizes ",
                  to_string(input.sizes()), " with dimension 1 being empty");
  // Within a window elements are counted in 32 bits.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCHCONV_CHECK(divides_evenly(p) || p.P == 0 || (p.H / p.P + 2) <= kMost / p.W, kOp,
                  ": a window of an image of ", p.H, " x ", p.W, " may not span more than ", kMost,
                  " elements, but got output_size=", to_string(output_size));
  return p;
}

std::tuple<Tensor, Tensor> adaptive_max_pool2d(const Tensor& input, IntList output_size) {
  const AdaptiveProblem p = describe_max(input, output_size);
  const Execution run(input);
  const Tensor x = dense(input, p.layout);
  Tensor y = new_output(input, p, input.scalar_type());
  Tensor indices = new_output(input, p, ScalarType::Long);
  kernels::adaptive_max_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(),
                               static_cast<int64_t*>(indices.mutable_data_ptr()), run);
  return {y, indices};
}

Tensor adaptive_max_pool2d_values(const Tensor& input, IntList output_size) {
  const AdaptiveProblem p = describe_max(input, output_size);
  const Execution run(input);
  const Tensor x = dense(input, p.layout);
  Tensor y = new_output(input, p, input.scalar_type());
  kernels::adaptive_max_pool2d(p, x.const_data_ptr(), y.mutable_data_ptr(), nullptr, run);
  return y;
}

Tensor adaptive_max_pool2d_backward(const Tensor& grad_output, const Tensor& indices,
                                    IntList input_size, bool channels_last) {
  constexpr const char* kOp = "adaptive_max_pool2d_backward";
  const AdaptiveProblem p = describe_backward(grad_output, input_size, channels_last, kOp);
  check_indices(indices, grad_output, grad_output.sizes(), kOp);
  const Execution run(grad_output);
  const Tensor dy = dense(grad_output, p.layout), chosen = dense(indices, p.layout);
  Tensor dx = new_gradient(grad_output, p);
  kernels::adaptive_max_pool2d_backward(p, dy.const_data_ptr(),
                                        static_cast<const int64_t*>(chosen.const_data_ptr()),
                                        dx.mutable_data_ptr(), run);
  return dx;
}

Tensor adaptive_max_pool2d_gather(const Tensor& input, const Tensor& indices) {
  constexpr const char* kOp = "adaptive_max_pool2d_gather";
  const IntList x_size = input.sizes(), size = indices.sizes();
  TORCHCONV_CHECK(
      size.size() == 4 && x_size.size() == 4 && size[0] == x_size[0] && size[1] == x_size[1], kOp,
      ": indices of size ", to_string(size), " do not belong to an input of size ",
      to_string(x_size));
  const AdaptiveProblem p =
      describe(input, x_size, std::array{size[2], size[3]}, suggested_layout(input), kOp);
  check_indices(indices, input, size, kOp);
  const Execution run(input);
  const Tensor x = dense(input, p.layout), chosen = dense(indices, p.layout);
  Tensor y = new_output(input, p, input.scalar_type());
  kernels::adaptive_max_pool2d_gather(p, x.const_data_ptr(),
                                      static_cast<const int64_t*>(chosen.const_data_ptr()),
                                      y.mutable_data_ptr(), run);
  return y;
}

}  // namespace

#ifndef TORCHCONV_CUDA
Tensor adaptive_avg_pool2d_step(const Tensor& input, SettingsReader* reader, Repeat* repeat) {
  return with_next_settings<&adaptive_avg_pool2d_with>(reader, input, repeat);
}
#endif

STABLE_TORCH_LIBRARY_IMPL(torchconv, TORCHCONV_KEY, m) {
  implement<&adaptive_avg_pool2d, Tensor>(m, "adaptive_avg_pool2d");
  implement<&adaptive_avg_pool2d_backward, Tensor>(m, "adaptive_avg_pool2d_backward");
  implement<&adaptive_max_pool2d, Tensor>(m, "adaptive_max_pool2d");
  implement<&adaptive_max_pool2d_values, Tensor>(m, "adaptive_max_pool2d_values");
  implement<&adaptive_max_pool2d_backward, Tensor, Tensor>(m, "adaptive_max_pool2d_backward");
  m.impl("adaptive_max_pool2d_gather", TORCH_BOX(&adaptive_max_pool2d_gather));
}

}  // namespace torchconv::ops
