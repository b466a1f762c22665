// The convolution operators: check once, allocate, describe one ConvProblem, call the kernels.

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/conv_problem.h"
#include "core/weights_owner.h"
#include "ops/backend.h"
#include "ops/chain.h"
#include "ops/settings.h"
#include "ops/tensor_args.h"
#ifndef TORCHCONV_CUDA
#include "core/buffer.h"
#include "ops/cpu/layout_change.h"
#endif

namespace torchconv::ops {
namespace {

struct ConvArguments {
  IntList stride, padding, dilation;  // padding: left, right, top, bottom
  int64_t groups;
  const std::string& activation;
  bool flip;
};

Activation activation_of(const std::string& name) {
  static constexpr std::pair<const char*, Activation> kNames[] = {
      {"none", Activation::kNone},           {"relu", Activation::kReLU},
      {"relu6", Activation::kReLU6},         {"sigmoid", Activation::kSigmoid},
      {"tanh", Activation::kTanh},           {"silu", Activation::kSiLU},
      {"hardswish", Activation::kHardswish}, {"gelu", Activation::kGELU},
  };
  for (const auto& [known, activation] : kNames)
    if (name == known) return activation;
  fail({"unknown activation '", name, "'"});
}

bool is_floating(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat64 || t == DType::kBFloat16 ||
         t == DType::kFloat16;
}

void check_same_kind(const Tensor& input, const Tensor& other, const char* name) {
  TORCHCONV_CHECK(other.scalar_type() == input.scalar_type(), "Input type (",
                  torch::headeronly::toString(input.scalar_type()), ") and ", name, " type (",
                  torch::headeronly::toString(other.scalar_type()), ") should be the same");
  TORCHCONV_CHECK(other.device() == input.device(), "Input and ", name,
                  " should be on the same device");
}

// One axis of the output: how many positions of the dilated kernel fit in the padded image.
int64_t output_size(int64_t size, int64_t before, int64_t after, int64_t dilation, int64_t kernel,
                    int64_t stride) {
  const int64_t padded =
      checked_add(checked_add(size, before, "padded input size"), after, "padded input size");
  const int64_t extent =
      checked_add(checked_mul(dilation, kernel - 1, "kernel extent"), 1, "kernel extent");
  return padded < extent ? 0 : (padded - extent) / stride + 1;
}

// PyTorch's rule: channels_last as soon as either operand is, but never for an empty batch.
Layout output_layout(const Tensor& input, const Tensor& weight) {
  const bool channels_last =
      suggested_layout(weight) == Layout::kNHWC || suggested_layout(input) == Layout::kNHWC;
  return channels_last && input.size(0) > 0 ? Layout::kNHWC : Layout::kNCHW;
}

ConvProblem describe(const Tensor& input, const Tensor& weight, const ConvArguments& a) {
  const IntList x = input.sizes(), w = weight.sizes();
  TORCHCONV_CHECK(
      x.size() == 4,
      "Expected 4D (batched) input to torchconv::conv2d, but got input of size: ", to_string(x));
  TORCHCONV_CHECK(
      w.size() == 4,
      "Expected 4D weight for torchconv::conv2d, but got weight of size: ", to_string(w));
  check_same_kind(input, weight, "weight");
  const auto [stride_h, stride_w] = pair(a.stride, "stride");
  const auto [dilation_h, dilation_w] = pair(a.dilation, "dilation");
  TORCHCONV_CHECK(
      a.padding.size() == 4,
      "expected padding to be a list of 4 values (left, right, top, bottom), but got padding=",
      to_string(a.padding));
  TORCHCONV_CHECK(stride_h > 0 && stride_w > 0,
                  "non-positive stride is not supported, but got stride=", to_string(a.stride));
  TORCHCONV_CHECK(dilation_h > 0 && dilation_w > 0,
                  "dilation should be greater than zero, but got ", to_string(a.dilation));
  TORCHCONV_CHECK(a.groups > 0, "non-positive groups is not supported, but got groups=", a.groups);
  TORCHCONV_CHECK(w[0] >= a.groups && w[2] > 0 && w[3] > 0, "Given groups=", a.groups,
                  ", expected weight to be at least ", a.groups,
                  " at dimension 0 and at least 1 at dimensions 2 and 3, but got weight of size ",
                  to_string(w), " instead");
  TORCHCONV_CHECK(w[0] % a.groups == 0, "Given groups=", a.groups,
                  ", expected weight to be divisible by ", a.groups,
                  " at dimension 0, but got weight of size ", to_string(w), " instead");
  const int64_t channels = checked_mul(w[1], a.groups, "number of channels");
  TORCHCONV_CHECK(x[1] == channels, "Given groups=", a.groups, ", weight of size ", to_string(w),
                  ", expected input", to_string(x), " to have ", channels, " channels, but got ",
                  x[1], " channels instead");
  TORCHCONV_CHECK(
      x[2] > 0 && x[3] > 0,
      "Only zero batch or zero channel inputs are supported, but got input shape: ", to_string(x));

  ConvProblem p{};
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.K = w[0], p.R = w[2], p.S = w[3];
  for (const int i : {0, 2}) {
    const int64_t size = i == 0 ? p.W : p.H, before = a.padding[i], after = a.padding[i + 1];
    checked_add(size, after, "padded input size");
    const int64_t kept = checked_add(size, std::min<int64_t>(before, 0), "cropped input size");
    TORCHCONV_CHECK(checked_add(kept, std::min<int64_t>(after, 0), "cropped input size") > 0,
                    "negative padding ", before, " and ", after, " crops all of an input of size ",
                    size);
  }
  p.P = output_size(p.H, a.padding[2], a.padding[3], dilation_h, p.R, stride_h);
  p.Q = output_size(p.W, a.padding[0], a.padding[1], dilation_w, p.S, stride_w);
  TORCHCONV_CHECK(p.P > 0 && p.Q > 0, "Calculated padded input size per channel: (",
                  p.H + a.padding[2] + a.padding[3], " x ", p.W + a.padding[0] + a.padding[1],
                  "). Kernel size: (", dilation_h * (p.R - 1) + 1, " x ",
                  dilation_w * (p.S - 1) + 1,
                  "). Kernel size can't be greater than actual input size");
  int64_t bytes = 16;
  for (const int64_t size : {p.P, p.Q, p.K, std::max<int64_t>(p.N, 1)})
    bytes = checked_mul(bytes, size, "output size in bytes");
  p.stride_h = stride_h, p.stride_w = stride_w;
  p.pad_top = a.padding[2], p.pad_left = a.padding[0];
  p.dilation_h = dilation_h, p.dilation_w = dilation_w;
  p.groups = a.groups;
  p.dtype = dtype_of(input, "conv2d");
  p.weight_layout = suggested_layout(weight);
  p.layout = output_layout(input, weight);
  p.activation = activation_of(a.activation);
  p.flip = a.flip;
  TORCHCONV_CHECK(is_floating(p.dtype) || p.activation == Activation::kNone,
                  "conv2d with activation '", a.activation, "' not implemented for '",
                  torch::headeronly::toString(input.scalar_type()), "'");
  TORCHCONV_CHECK(input.scalar_type() != ScalarType::Bool && p.dtype != DType::kUInt16,
                  "\"conv2d\" not implemented for '",
                  torch::headeronly::toString(input.scalar_type()), "'");
  return p;
}

void check_output_like(const ConvProblem& p, const Tensor& input, const Tensor& t,
                       const char* name) {
  const std::array<int64_t, 4> sizes{p.N, p.K, p.P, p.Q};
  const IntList s = t.sizes();
  TORCHCONV_CHECK(s.size() == 4 && std::equal(s.begin(), s.end(), sizes.begin()), "expected ", name,
                  " of size ", to_string(sizes), ", but got ", to_string(s));
  check_same_kind(input, t, name);
}

#ifndef TORCHCONV_CUDA
// Where the part of a concatenation lies, if the kernels can write it there and the sizes fit.
std::optional<Tensor> place_of(const ConvProblem& p, const Tensor& input,
                               const ConcatenatedPart& part) {
  // Smaller ones leave a choice of layout.
  if (p.layout != Layout::kNHWC || p.K < 2 || p.P < 2 || p.Q < 2 ||
      !kernels::conv2d_writes_parts(p))
    return std::nullopt;
  const std::array<int64_t, 4> sizes{p.N, part.channels, p.P, p.Q};
  std::optional<Tensor>& whole = *part.whole;
  if (!whole.has_value()) whole = new_tensor(input, sizes, input.scalar_type(), p.layout);
  const IntList s = whole->sizes();
  const bool fits = std::equal(s.begin(), s.end(), sizes.begin()) &&
                    whole->scalar_type() == input.scalar_type() && part.first >= 0 &&
                    part.first <= part.channels - p.K;
  if (!fits) return std::nullopt;
  return torch::stable::narrow(*whole, 1, part.first, p.K);
}
#endif

#ifndef TORCHCONV_CUDA
// The channels of the image that the gradient is a part of in the problem's layout, or 0: it is no
// part of one, or of so few pixels that the layout is not certain.
int64_t channels_of_whole(const ConvProblem& p, const Tensor& grad_output) {
  if (p.N < 1 || p.K < 2 || p.P < 2 || p.Q < 2) return 0;
  const IntList s = grad_output.strides();
  const bool pixels = p.layout == Layout::kNHWC;
  const int64_t channels = pixels ? s[3] : s[0] / (p.P * p.Q);
  const std::array<int64_t, 4> sizes{p.N, channels, p.P, p.Q};
  const auto strides = dense_strides({sizes.data(), sizes.size()}, p.layout);
  return channels > p.K && std::equal(s.begin(), s.end(), strides.begin()) ? channels : 0;
}
#endif

// y, and z where it is asked for.
std::tuple<Tensor, std::optional<Tensor>> forward(const Tensor& input, const Tensor& weight,
                                                  const std::optional<Tensor>& bias,
                                                  const std::optional<Tensor>& residual,
                                                  const ConvArguments& a, bool preactivation,
                                                  const WeightsOwner& owner = {},
                                                  [[maybe_unused]] Repeat* repeat = nullptr,
                                                  const ConcatenatedPart* part = nullptr) {
  ConvProblem p = describe(input, weight, a);
  std::optional<Tensor> b;
  if (bias.has_value()) {
    const IntList sizes = bias->sizes();
    TORCHCONV_CHECK(sizes.size() == 1 && sizes[0] == p.K, "Given weight of size ",
                    to_string(weight.sizes()), ", expected bias to be 1-dimensional with ", p.K,
                    " elements, but got bias of size ", to_string(sizes), " instead");
    check_same_kind(input, *bias, "bias");
    b = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
  }
  const Execution run(input);
  std::optional<Tensor> added;
  if (residual.has_value()) {
    check_output_like(p, input, *residual, "residual");
    TORCHCONV_CHECK(is_floating(p.dtype), "conv2d with a residual not implemented for '",
                    torch::headeronly::toString(input.scalar_type()), "'");
    added = dense(*residual, p.layout);
  }
  const Tensor x = dense(input, p.layout), w = dense(weight, p.weight_layout);
  const std::array<int64_t, 4> sizes{p.N, p.K, p.P, p.Q};
  std::optional<Tensor> place;
#ifndef TORCHCONV_CUDA
  if (part != nullptr && !residual.has_value()) place = place_of(p, input, *part);
#endif
  if (place.has_value()) p.pixel_channels = part->channels;
  Tensor y = place.has_value() ? *place : new_tensor(input, sizes, input.scalar_type(), p.layout);
  std::optional<Tensor> z;
  if (preactivation) z = new_tensor(input, sizes, input.scalar_type(), p.layout);
  // A dense copy is at an address of its own in every call.
  const bool in_place = w.get() == weight.get();
  kernels::conv2d_fprop(p, x.const_data_ptr(), w.const_data_ptr(),
                        in_place ? owner : WeightsOwner{}, b ? b->const_data_ptr() : nullptr,
                        added ? added->const_data_ptr() : nullptr, y.mutable_data_ptr(),
                        z ? z->mutable_data_ptr() : nullptr, run);
#ifndef TORCHCONV_CUDA
  const auto as_it_is = [](const std::optional<Tensor>& read, const std::optional<Tensor>& given) {
    return !given.has_value() || read->get() == given->get();
  };
  if (repeat != nullptr && !preactivation && in_place && as_it_is(b, bias) &&
      as_it_is(added, residual)) {
    const bool turns = x.get() != input.get();
    const auto change = turns ? layout_change(input, p.layout) : std::nullopt;
    const auto plan = turns && !change.has_value() ? nullptr : kernels::plan_conv2d_fprop(p, owner);
    if (plan != nullptr)
      *repeat = [plan, owner, change](const StepMemory& m) {
        const void* image = m.tensors[0];
        std::optional<Buffer<char>> copy;
        if (change.has_value()) {
          copy.emplace(change->bytes());
          change->run(image, copy->get(), torch_threads());
          image = copy->get();
        }
        plan->run(image, m.tensors[1], owner, m.tensors[2], m.tensors[3], m.result, nullptr,
                  torch_threads());
      };
  }
#endif
  return {y, z};
}

Tensor conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              IntList stride, IntList padding, IntList dilation, int64_t groups,
              const std::string& activation, bool flip_kernel,
              const std::optional<Tensor>& residual) {
  const ConvArguments a{stride, padding, dilation, groups, activation, flip_kernel};
  return std::get<0>(forward(input, weight, bias, residual, a, /*preactivation=*/false));
}

// What the overloads' settings say. The lists are theirs.
class ConvSettings {
 public:
  explicit ConvSettings(SettingsReader* reader)
      : stride_(reader->take<IntList>()),
        padding_(reader->take<IntList>()),
        dilation_(reader->take<IntList>()),
        groups_(reader->take<int64_t>()),
        activation_(reader->take<std::string>()),
        flip_kernel_(reader->take<bool>()) {}

  ConvArguments arguments() const {
    return {stride_, padding_, dilation_, groups_, activation_, flip_kernel_};
  }

 private:
  IntList stride_, padding_, dilation_;
  int64_t groups_;
  std::string activation_;
  bool flip_kernel_;
};

WeightsOwner take_owner(SettingsReader* reader) {
  return {reader->take<int64_t>(), reader->take<int64_t>(), reader->take<bool>()};
}

// conv2d's overload: its settings may end with the owner of packed weights (who is no argument of
// conv2d: what is traced knows nothing of him), and the residual comes before them.
Tensor conv2d_settings(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& residual, const Tensor& settings) {
  SettingsReader reader(settings);
  const ConvSettings conv(&reader);
  WeightsOwner owner;
  if (!reader.ended()) owner = take_owner(&reader);
  return std::get<0>(
      forward(input, weight, bias, residual, conv.arguments(), /*preactivation=*/false, owner));
}

std::tuple<Tensor, Tensor> conv2d_with_preactivation(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntList stride,
    IntList padding, IntList dilation, int64_t groups, const std::string& activation,
    bool flip_kernel, const std::optional<Tensor>& residual) {
  const ConvArguments a{stride, padding, dilation, groups, activation, flip_kernel};
  auto [y, z] = forward(input, weight, bias, residual, a, /*preactivation=*/true);
  return {y, *z};
}

std::tuple<Tensor, Tensor> conv2d_with_preactivation_settings(const Tensor& input,
                                                              const Tensor& weight,
                                                              const std::optional<Tensor>& bias,
                                                              const std::optional<Tensor>& residual,
                                                              const Tensor& settings) {
  SettingsReader reader(settings);
  const ConvSettings conv(&reader);
  auto [y, z] = forward(input, weight, bias, residual, conv.arguments(), /*preactivation=*/true);
  return {y, *z};
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                   const Tensor& weight,
                                                   const std::optional<Tensor>& saved,
                                                   IntList stride, IntList padding,
                                                   IntList dilation, int64_t groups,
                                                   const std::string& activation, bool flip_kernel,
                                                   const std::vector<bool>& output_mask) {
  ConvProblem p =
      describe(input, weight, {stride, padding, dilation, groups, activation, flip_kernel});
  TORCHCONV_CHECK(is_floating(p.dtype), "conv2d_backward not implemented for '",
                  torch::headeronly::toString(input.scalar_type()), "'");
  TORCHCONV_CHECK(output_mask.size() == 3,
                  "expected output_mask to be a list of 3 values, but got ", output_mask.size());
  check_output_like(p, input, grad_output, "grad_output");
  // A single channel is dense in both layouts: then dz is read as it lies.
  const Layout input_layout = p.layout;
  if (p.C == 1 && p.N > 0) p.layout = suggested_layout(grad_output);
  TORCHCONV_CHECK(saved.has_value() == (p.activation != Activation::kNone),
                  "conv2d_backward with activation '", activation,
                  saved.has_value() ? "' takes no saved tensor" : "' needs the saved tensor");
  const Execution run(input);
  std::optional<Tensor> s;
  if (saved.has_value()) {
    check_output_like(p, input, *saved, "saved");
    s = dense(*saved, p.layout);
  }
#ifndef TORCHCONV_CUDA
  if (s.has_value()) p.pixel_channels = channels_of_whole(p, grad_output);
#endif
  const Tensor dy = p.pixel_channels > 0 ? grad_output : dense(grad_output, p.layout);
  const Tensor x = dense(input, p.layout), w = dense(weight, p.weight_layout);
  const ScalarType type = input.scalar_type();
  const Tensor dx =
      output_mask[0] ? new_tensor(input, input.sizes(), type, input_layout) : no_tensor(input);
  const Tensor dw =
      output_mask[1] ? new_tensor(input, weight.sizes(), type, p.weight_layout) : no_tensor(input);
  const Tensor db = output_mask[2] ? new_vector(input, p.K) : no_tensor(input);
  const auto wanted = [&](int i, const Tensor& t) {
    return output_mask[i] ? t.mutable_data_ptr() : nullptr;
  };
  kernels::conv2d_backward(p, dy.const_data_ptr(), s ? s->const_data_ptr() : nullptr,
                           x.const_data_ptr(), w.const_data_ptr(), wanted(0, dx), wanted(1, dw),
                           wanted(2, db), run);
  return {dx, dw, db};
}

// Lines of fields, see cpu/conv_explain.h. Reads sizes, strides and types only.
std::string explain_conv2d(const Tensor& input, const Tensor& weight, IntList stride,
                           IntList padding, IntList dilation, int64_t groups, bool flip_kernel) {
  const ConvProblem p =
      describe(input, weight, {stride, padding, dilation, groups, "none", flip_kernel});
  TORCHCONV_CHECK(is_floating(p.dtype), "explain not implemented for '",
                  torch::headeronly::toString(input.scalar_type()), "'");
  TORCHCONV_CHECK(p.N > 0 && p.C > 0, "nothing to explain for an empty input of size ",
                  to_string(input.sizes()));
  return explanation(p, Execution(input));
}

}  // namespace

#ifndef TORCHCONV_CUDA
Tensor conv2d_step(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& residual, SettingsReader* reader, Repeat* repeat,
                   const ConcatenatedPart* part) {
  const bool in_same_layout = reader->take<bool>();
  const ConvSettings conv(reader);
  const WeightsOwner owner = take_owner(reader);
  TORCHCONV_CHECK(!in_same_layout || (residual.has_value() &&
                                      suggested_layout(*residual) == output_layout(input, weight)),
                  "the residual is in another layout than the output");
  return std::get<0>(forward(input, weight, bias, residual, conv.arguments(),
                             /*preactivation=*/false, owner, repeat, part));
}

STABLE_TORCH_LIBRARY_IMPL(torchconv, Meta, m) {
  m.impl("explain_conv2d", TORCH_BOX(&explain_conv2d));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(torchconv, TORCHCONV_KEY, m) {
  m.impl("explain_conv2d", TORCH_BOX(&explain_conv2d));
  m.impl("conv2d", TORCH_BOX(&conv2d));
  m.impl("conv2d.settings", TORCH_BOX(&conv2d_settings));
  m.impl("conv2d_with_preactivation", TORCH_BOX(&conv2d_with_preactivation));
  m.impl("conv2d_with_preactivation.settings", TORCH_BOX(&conv2d_with_preactivation_settings));
  implement<&conv2d_backward, Tensor, Tensor, Tensor, std::optional<Tensor>>(m, "conv2d_backward");
}

}  // namespace torchconv::ops
