// What autograd records of plain calls, in C++: next to small kernels the Functions in Python,
// which torchconv/_recorded.py has for everything else, are most of a step.
//
// Each operator here runs the overload for short calls of the operator it records
// (torchconv/_settings.py), and so does its node for backward. Where a backward is itself
// differentiated, transformed, traced or watched, it calls the whole operator instead, whose
// derivatives are in torchconv/autograd.py.
//
// LibTorch's stable ABI has no autograd. So this is a library of its own, like growth.cpp's, which
// only the very PyTorch that it was compiled with may open.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

namespace torchconv {
namespace {

using at::Tensor;
using c10::DispatchKey;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Integers = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

constexpr const char* kSettings = "settings";

Tensor of(const Optional& tensor) { return tensor.has_value() ? *tensor : Tensor(); }

c10::IValue value_of(const Tensor& tensor) {
  return tensor.defined() ? c10::IValue(tensor) : c10::IValue();
}

Integers integers(const Tensor& settings) {
  const int64_t* const first = settings.const_data_ptr<int64_t>();
  return Integers(first, first + settings.numel());
}

Tensor settings_of(const Integers& numbers) {
  Tensor settings = at::empty({static_cast<int64_t>(numbers.size())}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), settings.mutable_data_ptr<int64_t>());
  return settings;
}

// Of settings, the value of this type at *number, which moves behind it.
c10::IValue next_value(const c10::Type& type, const int64_t** number) {
  const int64_t first = *(*number)++;
  const int64_t* const begin = *number;
  switch (type.kind()) {
    case c10::TypeKind::OptionalType:  // of an integer
      ++*number;
      return first != 0 ? c10::IValue(*begin) : c10::IValue();
    case c10::TypeKind::StringType:
      *number += first;
      return std::string(begin, *number);
    case c10::TypeKind::ListType: {
      *number += first;
      if (type.containedType(0)->kind() != c10::TypeKind::BoolType) return Integers(begin, *number);
      c10::List<bool> flags;
      for (int64_t i = 0; i < first; ++i) flags.push_back(begin[i] != 0);
      return flags;
    }
    case c10::TypeKind::BoolType:
      return first != 0;
    default:
      TORCH_INTERNAL_ASSERT(type.kind() == c10::TypeKind::IntType, type.str());
      return first;
  }
}

// Whether nothing differentiates, transforms, traces or watches an operator of these tensors here,
// as is_plain of torchconv/_dispatch.py.
bool is_plain(const variable_list& tensors) {
  constexpr auto kAutograd = c10::autograd_dispatch_keyset_with_ADInplaceOrView;
  constexpr auto kUsual =
      kAutograd | c10::autocast_dispatch_keyset | c10::DispatchKeySet(DispatchKey::BackendSelect);
  constexpr c10::DispatchKeySet kCpu(DispatchKey::CPU);
  if (c10::GradMode::is_enabled()) return false;
  if (!(c10::impl::tls_local_dispatch_key_set().included_ - kUsual).empty()) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) {
    return !tensor.defined() ||
           (tensor.key_set() - kUsual == kCpu - kUsual && !tensor._fw_grad(/*level=*/0).defined());
  });
}

// An operator and its overload for short calls.
class Operator {
 public:
  explicit Operator(const std::string& name)
      : whole_(find(name, "")), short_(find(name, kSettings)) {}

  variable_list in_short(const variable_list& tensors, const Tensor& settings) const {
    torch::jit::Stack stack = stacked(tensors);
    stack.emplace_back(settings);
    return called(short_, &stack);
  }

  // Of a backward, whose tensors come before everything else.
  variable_list operator()(const variable_list& tensors, const Integers& numbers) const {
    if (is_plain(tensors)) return in_short(tensors, settings_of(numbers));
    torch::jit::Stack stack = stacked(tensors);
    const auto& arguments = whole_.schema().arguments();
    const int64_t* number = numbers.data();
    while (stack.size() < arguments.size()) {
      stack.push_back(next_value(*arguments[stack.size()].type(), &number));
    }
    return called(whole_, &stack);
  }

 private:
  static c10::OperatorHandle find(const std::string& name, const char* overload) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("torchconv::" + name).c_str(), overload);
  }

  static torch::jit::Stack stacked(const variable_list& tensors) {
    torch::jit::Stack stack;
    stack.reserve(tensors.size() + 8);
    for (const Tensor& tensor : tensors) stack.push_back(value_of(tensor));
    return stack;
  }

  static variable_list called(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    op.callBoxed(stack);
    variable_list results;
    for (c10::IValue& result : *stack) results.push_back(std::move(result).toTensor());
    return results;
  }

  c10::OperatorHandle whole_, short_;
};

bool is_none(const int64_t* text) { return std::string(text + 1, text + 1 + *text) == "none"; }

// Which inputs' gradients the running backward uses. There is an edge for each input that is given.
std::vector<bool> wanted(const AutogradContext* ctx, const std::vector<bool>& given) {
  std::vector<bool> result;
  size_t edge = 0;
  for (const bool is_given : given) result.push_back(is_given && ctx->needs_input_grad(edge++));
  return result;
}

// Behind the other settings of a backward, its output_mask.
void push_mask(const std::vector<bool>& mask, Integers* numbers) {
  numbers->push_back(static_cast<int64_t>(mask.size()));
  numbers->insert(numbers->end(), mask.begin(), mask.end());
}

bool any(const std::vector<bool>& flags) {
  return std::find(flags.begin(), flags.end(), true) != flags.end();
}

}  // namespace

// `conv2d` without a residual, of an activation whose derivative its output tells.
struct Conv2dFunction : Function<Conv2dFunction> {
  static constexpr int64_t kActivation = 12;  // in settings: behind two pairs, padding and groups

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const Optional& bias, const Tensor& settings) {
    static const Operator op("conv2d");
    ctx->set_materialize_grads(false);
    Tensor y = op.in_short({input, weight, of(bias), Tensor()}, settings)[0];
    const bool is_linear = is_none(settings.const_data_ptr<int64_t>() + kActivation);
    ctx->save_for_backward({input, weight, is_linear ? Tensor() : y});
    ctx->saved_data[kSettings] = settings;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator op("conv2d_backward");
    variable_list gradients(4);
    const auto mask = wanted(ctx, {true, true, ctx->saved_data["bias"].toBool()});
    if (!grads[0].defined() || !any(mask)) return gradients;
    const variable_list saved = ctx->get_saved_variables();
    Integers numbers = integers(ctx->saved_data[kSettings].toTensor());
    push_mask(mask, &numbers);
    const variable_list all = op({grads[0], saved[0], saved[1], saved[2]}, numbers);
    for (size_t i = 0; i < mask.size(); ++i) {
      if (mask[i]) gradients[i] = all[i];
    }
    return gradients;
  }
};

// A pooling. Each is a type of its own, because autograd names the node by it.
template <typename T>
struct Pool2d : Function<T> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& settings) {
    static const Operator op(T::kOp);
    ctx->set_materialize_grads(false);
    variable_list outputs = op.in_short({input}, settings);
    Integers numbers = {input.dim()};
    numbers.insert(numbers.end(), input.sizes().begin(), input.sizes().end());
    const Integers given = integers(settings);
    numbers.insert(numbers.end(), given.begin(), given.begin() + T::kTaken);
    numbers.push_back(input.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
    // What was selected, if that is how the operator pools.
    ctx->save_for_backward({outputs.begin() + 1, outputs.end()});
    ctx->saved_data[kSettings] = settings_of(numbers);
    return outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator op(T::kBackward);
    variable_list gradients(2);
    if (!grads[0].defined()) return gradients;
    variable_list tensors = ctx->get_saved_variables();
    tensors.insert(tensors.begin(), grads[0]);
    gradients[0] = op(tensors, integers(ctx->saved_data[kSettings].toTensor()))[0];
    return gradients;
  }

  static Tensor record(const Tensor& input, const Tensor& settings) {
    return T::apply(input, settings);
  }
};

// kTaken: how many of the forward's settings the backward takes, between input's size and layout.
struct MaxPool2dFunction : Pool2d<MaxPool2dFunction> {
  static constexpr const char *kOp = "max_pool2d_with_offsets",
                              *kBackward = "select_pool2d_backward";
  static constexpr int64_t kTaken = 12;
};

struct MinPool2dFunction : Pool2d<MinPool2dFunction> {
  static constexpr const char *kOp = "min_pool2d_with_offsets",
                              *kBackward = "select_pool2d_backward";
  static constexpr int64_t kTaken = 12;
};

struct AvgPool2dFunction : Pool2d<AvgPool2dFunction> {
  static constexpr const char *kOp = "avg_pool2d", *kBackward = "avg_pool2d_backward";
  static constexpr int64_t kTaken = 13;
};

struct AdaptiveAvgPool2dFunction : Pool2d<AdaptiveAvgPool2dFunction> {
  static constexpr const char *kOp = "adaptive_avg_pool2d",
                              *kBackward = "adaptive_avg_pool2d_backward";
  static constexpr int64_t kTaken = 0;
};

struct AdaptiveMaxPool2dFunction : Pool2d<AdaptiveMaxPool2dFunction> {
  static constexpr const char *kOp = "adaptive_max_pool2d",
                              *kBackward = "adaptive_max_pool2d_backward";
  static constexpr int64_t kTaken = 0;
};

// `batch_norm_training`, which changes the running statistics.
struct BatchNorm2dFunction : Function<BatchNorm2dFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Optional& weight,
                        const Optional& bias, const Optional& residual,
                        const Optional& running_mean, const Optional& running_var,
                        const Tensor& settings) {
    static const Operator op("batch_norm_training");
    ctx->set_materialize_grads(false);
    const variable_list outputs = op.in_short(
        {input, of(weight), of(bias), of(residual), of(running_mean), of(running_var)}, settings);
    const int64_t* const activation = settings.const_data_ptr<int64_t>() + 2;  // behind two floats
    const bool is_linear = is_none(activation);
    // What decides where the activation is constant is the input, or where something was added to
    // it the output. In the first case alone backward needs the bias; of another only the type
    // counts, the weight's, so that it may change before backward.
    const bool of_output = residual.has_value() && !is_linear;
    const bool spares_bias = weight.has_value() && bias.has_value() && (is_linear || of_output);
    ctx->save_for_backward({input, of_output ? outputs[0] : Tensor(), of(weight),
                            of(spares_bias ? weight : bias), outputs[1], outputs[2]});
    Integers numbers = {/*training=*/1};
    numbers.insert(numbers.end(), activation, activation + 1 + *activation);
    ctx->saved_data[kSettings] = settings_of(numbers);
    ctx->saved_data["residual"] = residual.has_value();
    ctx->saved_data["linear"] = is_linear;
    return outputs[0];
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const Operator op("batch_norm_backward");
    variable_list gradients(7);
    if (!grads[0].defined()) return gradients;
    variable_list saved = ctx->get_saved_variables();
    const auto of_inputs = wanted(
        ctx, {true, saved[2].defined(), saved[3].defined(), ctx->saved_data["residual"].toBool()});
    const bool is_linear = ctx->saved_data["linear"].toBool();
    // In the order of the operator's results: the residual comes second.
    const std::vector<bool> mask = {of_inputs[0], of_inputs[3] && !is_linear, of_inputs[1],
                                    of_inputs[2]};
    if (any(mask)) {
      Integers numbers = integers(ctx->saved_data[kSettings].toTensor());
      push_mask(mask, &numbers);
      saved.insert(saved.begin(), grads[0]);
      const variable_list all = op(saved, numbers);
      constexpr int kPlaces[] = {0, 3, 1, 2};
      for (size_t i = 0; i < mask.size(); ++i) {
        if (mask[i]) gradients[kPlaces[i]] = all[i];
      }
    }
    if (of_inputs[3] && is_linear) gradients[3] = grads[0];
    return gradients;
  }
};

namespace {

Tensor record_conv2d(const Tensor& input, const Tensor& weight, const Optional& bias,
                     const Tensor& settings) {
  return Conv2dFunction::apply(input, weight, bias, settings);
}

// which: its place here, as in _POOLINGS of torchconv/_recorded.py.
Tensor record_pool2d(const Tensor& input, const Tensor& settings, int64_t which) {
  constexpr decltype(&MaxPool2dFunction::record) kPoolings[] = {
      MaxPool2dFunction::record, MinPool2dFunction::record, AvgPool2dFunction::record,
      AdaptiveAvgPool2dFunction::record, AdaptiveMaxPool2dFunction::record};
  TORCH_CHECK(which >= 0 && which < static_cast<int64_t>(std::size(kPoolings)),
              "record_pool2d: no pooling has the number ", which);
  return kPoolings[which](input, settings);
}

Tensor record_batch_norm(const Tensor& input, const Optional& weight, const Optional& bias,
                         const Optional& residual, const Optional& running_mean,
                         const Optional& running_var, const Tensor& settings) {
  return BatchNorm2dFunction::apply(input, weight, bias, residual, running_mean, running_var,
                                    settings);
}
}  // namespace
}  // namespace torchconv

TORCH_LIBRARY_IMPL(torchconv, AutogradCPU, library) {
  library.impl("record_conv2d", TORCH_FN(torchconv::record_conv2d));
  library.impl("record_pool2d", TORCH_FN(torchconv::record_pool2d));
  library.impl("record_batch_norm", TORCH_FN(torchconv::record_batch_norm));
}
