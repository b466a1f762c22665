// The operators of batch normalisation, which only the CPU's library has: check once, allocate,
// describe one BatchNormProblem, call the kernels.

#include "cpu/batch_norm.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "ops/execution.h"
#include "ops/settings.h"
#include "ops/tensor_args.h"

namespace torchconv::ops {
namespace {

using MaybeTensor = std::optional<Tensor>;

bool is_small_float(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

// A problem without parameters has the type of its input for them. with_residual: whether something
// is added before the activation, which then has to be one whose derivative its output tells.
BatchNormProblem describe_norm(const Tensor& input, const std::string& activation,
                               bool with_residual) {
  constexpr const char* kOp = "batch_norm";
  const IntList x = input.sizes();
  TORCHCONV_CHECK(x.size() == 4, "expected 4D input to torchconv::batch_norm (got ", to_string(x),
                  ")");
  TORCHCONV_CHECK(input.numel() > 0, "no batch normalisation of an empty input of size ",
                  to_string(x));
  BatchNormProblem p{};
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.dtype = p.parameters = dtype_of(input, kOp);
  TORCHCONV_CHECK(
      p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64 || is_small_float(p.dtype), "\"",
      kOp, "\" not implemented for '", torch::headeronly::toString(input.scalar_type()), "'");
  // What is dense in both layouts, of one channel or one pixel, gives contiguous results here.
  p.layout = input.is_contiguous() ? Layout::kNCHW : suggested_layout(input);
  if (activation == "relu") {
    p.activation = Activation::kReLU;
  } else if (activation == "relu6") {
    p.activation = Activation::kReLU6;
  } else if (activation == "silu" && !with_residual) {
    p.activation = Activation::kSiLU;
  } else if (activation == "hardswish" && !with_residual) {
    p.activation = Activation::kHardswish;
  } else {
    TORCHCONV_CHECK(activation == "none", "batch_norm takes no activation '", activation, "'",
                    with_residual ? " after a sum" : "");
    p.activation = Activation::kNone;
  }
  return p;
}

// A tensor of one number for each channel: of the input's type, or float32 beside a smaller type,
// and all of them alike. Null where it is not there.
const void* by_channel(BatchNormProblem& p, const Tensor& input, const MaybeTensor& t,
                       const char* name, bool first) {
  if (!t.has_value()) return nullptr;
  const IntList sizes = t->sizes();
  TORCHCONV_CHECK(sizes.size() == 1 && sizes[0] == p.C && t->is_contiguous(), name,
                  " should be contiguous and contain ", p.C, " elements, not ", to_string(sizes));
  TORCHCONV_CHECK(t->device() == input.device(), "expected input and ", name,
                  " on the same device");
  const DType type = dtype_of(*t, "batch_norm");
  if (first) p.parameters = type;
  const bool fits = type == p.dtype || (is_small_float(p.dtype) && type == DType::kFloat32);
  TORCHCONV_CHECK(fits && type == p.parameters, "expected ", name, " of the type of input (",
                  torch::headeronly::toString(input.scalar_type()),
                  ") and of all parameters, but got ",
                  torch::headeronly::toString(t->scalar_type()));
  return t->const_data_ptr();
}

// by_channel for each of them.
template <size_t kCount>
std::array<const void*, kCount> parameters_of(BatchNormProblem& p, const Tensor& input,
                                              const std::array<const MaybeTensor*, kCount>& given,
                                              const std::array<const char*, kCount>& names) {
  std::array<const void*, kCount> found{};
  bool first = true;
  for (size_t i = 0; i < kCount; ++i) {
    found[i] = by_channel(p, input, *given[i], names[i], first);
    first = first && found[i] == nullptr;
  }
  return found;
}

// A tensor of the input's size and type, in its layout.
MaybeTensor like_input(const BatchNormProblem& p, const Tensor& input, const MaybeTensor& t,
                       const char* name) {
  if (!t.has_value()) return std::nullopt;
  const IntList x = input.sizes(), s = t->sizes();
  TORCHCONV_CHECK(s.size() == 4 && std::equal(s.begin(), s.end(), x.begin()), "expected ", name,
                  " of size ", to_string(x), ", but got ", to_string(s));
  TORCHCONV_CHECK(t->scalar_type() == input.scalar_type() && t->device() == input.device(),
                  "expected ", name, " of the type and on the device of input");
  return dense(*t, p.layout);
}

const void* data_of(const MaybeTensor& t) { return t ? t->const_data_ptr() : nullptr; }

Tensor new_statistics(const Tensor& input, int64_t channels) {
  return new_vector(input, channels, ScalarType::Double);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_training(
    const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
    const MaybeTensor& residual, const MaybeTensor& running_mean, const MaybeTensor& running_var,
    double momentum, double eps, const std::string& activation) {
  BatchNormProblem p = describe_norm(input, activation, residual.has_value());
  TORCHCONV_CHECK(input.numel() > p.C,
                  "Expected more than 1 value per channel when training, got input size ",
                  to_string(input.sizes()));
  const auto [w, b, m, v] =
      parameters_of<4>(p, input, {&weight, &bias, &running_mean, &running_var},
                       {"weight", "bias", "running_mean", "running_var"});
  const auto changed = [](const MaybeTensor& t) { return t ? t->mutable_data_ptr() : nullptr; };
  const MaybeTensor added = like_input(p, input, residual, "residual");
  const Tensor x = dense(input, p.layout);
  Tensor y = new_tensor(input, input.sizes(), input.scalar_type(), p.layout);
  Tensor mean = new_statistics(input, p.C), invstd = new_statistics(input, p.C);
  cpu::batch_norm_training(p, x.const_data_ptr(), data_of(added), {w, b},
                           {changed(running_mean), changed(running_var), momentum}, eps,
                           y.mutable_data_ptr(), static_cast<double*>(mean.mutable_data_ptr()),
                           static_cast<double*>(invstd.mutable_data_ptr()), Execution(input));
  return {y, mean, invstd};
}

Tensor batch_norm_inference(const Tensor& input, const MaybeTensor& weight, const MaybeTensor& bias,
                            const MaybeTensor& residual, const Tensor& running_mean,
                            const Tensor& running_var, double eps, const std::string& activation) {
  BatchNormProblem p = describe_norm(input, activation, residual.has_value());
  const MaybeTensor mean = running_mean, var = running_var;
  const auto [w, b, m, v] = parameters_of<4>(p, input, {&weight, &bias, &mean, &var},
                                             {"weight", "bias", "running_mean", "running_var"});
  const MaybeTensor added = like_input(p, input, residual, "residual");
  const Tensor x = dense(input, p.layout);
  Tensor y = new_tensor(input, input.sizes(), input.scalar_type(), p.layout);
  cpu::batch_norm_inference(p, x.const_data_ptr(), data_of(added), {w, b}, m, v, eps,
                            y.mutable_data_ptr(), Execution(input));
  return y;
}

const double* statistics_of(const BatchNormProblem& p, const Tensor& t, const char* name) {
  TORCHCONV_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Double && t.dim() == 1 &&
                      t.numel() == p.C && t.is_contiguous(),
                  "batch_norm_backward: ", name, " must be contiguous and hold ", p.C,
                  " numbers of type Double");
  return static_cast<const double*>(t.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_output, const Tensor& input, const MaybeTensor& output,
    const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean, const Tensor& invstd,
    bool training, const std::string& activation, const std::vector<bool>& output_mask) {
  TORCHCONV_CHECK(output_mask.size() == 4,
                  "expected output_mask to be a list of 4 values, but got ", output_mask.size());
  BatchNormProblem p = describe_norm(input, activation, output.has_value() || output_mask[1]);
  const auto [w, b] = parameters_of<2>(p, input, {&weight, &bias}, {"weight", "bias"});
  TORCHCONV_CHECK((weight.has_value() || !output_mask[2]) && (bias.has_value() || !output_mask[3]),
                  "batch_norm_backward: no gradient of a parameter that is not there");
  const MaybeTensor y = like_input(p, input, output, "output");
  const Tensor dy = *like_input(p, input, grad_output, "grad_output");
  const Tensor x = dense(input, p.layout);
  const auto made = [&](bool wanted) {
    return wanted ? new_tensor(input, input.sizes(), input.scalar_type(), p.layout)
                  : no_tensor(input);
  };
  const auto vector = [&](const MaybeTensor& t, bool wanted) {
    return wanted ? new_vector(*t, p.C) : no_tensor(t ? *t : input);
  };
  // The second pass reads what the first made of dy and y.
  const bool has_residual = y.has_value() || output_mask[1];
  const Tensor dx = made(output_mask[0]), dresidual = made(has_residual);
  const Tensor dweight = vector(weight, output_mask[2]), dbias = vector(bias, output_mask[3]);
  const auto to = [](const Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  cpu::batch_norm_backward(p, dy.const_data_ptr(), x.const_data_ptr(), data_of(y), {w, b},
                           statistics_of(p, mean, "mean"), statistics_of(p, invstd, "invstd"),
                           training, {to(dx), to(dresidual), to(dweight), to(dbias)},
                           Execution(input));
  return {dx, output_mask[1] ? dresidual : no_tensor(input), dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchconv, CPU, m) {
  implement<&batch_norm_training, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor,
            MaybeTensor>(m, "batch_norm_training");
  implement<&batch_norm_inference, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, Tensor, Tensor>(
      m, "batch_norm_inference");
  implement<&batch_norm_backward, Tensor, Tensor, MaybeTensor, MaybeTensor, MaybeTensor, Tensor,
            Tensor>(m, "batch_norm_backward");
}

}  // namespace torchconv::ops
