// The overloads `.settings` of the operators: what is not a tensor comes in one list of integers,
// the memory of a tensor. A list argument of its own costs a short call more than the rest of its
// way here. torchconv/_settings.py writes the list: an integer or flag as itself; a list or text as
// its length, then its elements; an optional integer as whether it is there, then it or a zero; a
// float as the bits of a double.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/tensor_args.h"

namespace torchconv::ops {

class SettingsReader {
 public:
  explicit SettingsReader(const Tensor& settings) {
    TORCHCONV_CHECK(settings.is_cpu() && settings.scalar_type() == ScalarType::Long &&
                        settings.dim() == 1 && settings.is_contiguous(),
                    "settings must be a list of integers on the CPU");
    next_ = static_cast<const int64_t*>(settings.const_data_ptr());
    end_ = next_ + settings.numel();
  }

  bool ended() const { return next_ == end_; }

  // The next argument. A list is valid as long as the settings are.
  template <typename T>
  T take() {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(*skip(1));
    } else if constexpr (std::is_same_v<T, double>) {
      double value;
      std::memcpy(&value, skip(1), sizeof(value));
      return value;
    } else if constexpr (std::is_same_v<T, IntList>) {
      const int64_t size = take<int64_t>();
      return IntList(skip(size), static_cast<size_t>(size));
    } else if constexpr (std::is_same_v<T, std::optional<int64_t>>) {
      const bool given = take<bool>();
      const int64_t value = take<int64_t>();
      return given ? T(value) : std::nullopt;
    } else {  // std::string, std::vector<bool>
      const IntList values = take<IntList>();
      return T(values.begin(), values.end());
    }
  }

 private:
  const int64_t* skip(int64_t count) {
    TORCHCONV_CHECK(count >= 0 && count <= end_ - next_, "settings end too early");
    return std::exchange(next_, next_ + count);
  }

  const int64_t* next_;
  const int64_t* end_;
};

namespace detail {

template <typename Result, typename... Parameters, size_t... rest, typename... Tensors>
Result call_with_settings(Result (*op)(Parameters...), std::index_sequence<rest...>,
                          SettingsReader* reader, const Tensors&... tensors) {
  using Types = std::tuple<std::decay_t<Parameters>...>;
  // Braces read from left to right.
  std::tuple<std::tuple_element_t<sizeof...(Tensors) + rest, Types>...> values{
      reader->take<std::tuple_element_t<sizeof...(Tensors) + rest, Types>>()...};
  return op(tensors..., std::get<rest>(values)...);
}

template <typename Result, typename... Parameters>
constexpr size_t count_parameters(Result (*)(Parameters...)) {
  return sizeof...(Parameters);
}

}  // namespace detail

// As op, whose first arguments are these tensors and whose others are none but come next.
template <auto op, typename... Tensors>
auto with_next_settings(SettingsReader* reader, const Tensors&... tensors) {
  constexpr size_t kRest = detail::count_parameters(op) - sizeof...(Tensors);
  return detail::call_with_settings(op, std::make_index_sequence<kRest>(), reader, tensors...);
}

template <auto op, typename... Tensors>
auto with_settings(const Tensors&... tensors, const Tensor& settings) {
  SettingsReader reader(settings);
  return with_next_settings<op>(&reader, tensors...);
}

// Registers op and its overload. Tensors: the types of op's first arguments.
template <auto op, typename... Tensors>
void implement(torch::stable::detail::StableLibrary& m, const std::string& name) {
  m.impl(name.c_str(), TORCH_BOX(op));
  m.impl((name + ".settings").c_str(), TORCH_BOX((&with_settings<op, Tensors...>)));
}

}  // namespace torchconv::ops
