// See linear.h.

#include "ops/cpu/linear.h"

#include <array>
#include <string>

#include "ops/cpu/aten.h"

namespace torchconv::ops {
namespace {

// The same memory, without a copy.
Tensor view(const Tensor& t, IntList sizes, IntList strides) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides.data(), 0, &handle));
  return Tensor(handle);
}

// A x B, dense, as A x B x 1 x 1.
Tensor pixels_of(const Tensor& t, int64_t a, int64_t b) {
  return view(t, std::array<int64_t, 4>{a, b, 1, 1}, std::array<int64_t, 4>{b, 1, 1, 1});
}

Tensor activate(const std::string& name, const Tensor& t) {
  if (name == "none") return t;
  if (name == "gelu") return aten("aten::gelu", "", t, std::string("none"));
  return aten(("aten::" + name).c_str(), "", t);
}

// As conv2d_step reads them.
std::string activation_of(SettingsReader* settings) {
  settings->take<bool>();
  for (int list = 0; list < 3; ++list) settings->take<IntList>();
  settings->take<int64_t>();
  std::string activation = settings->take<std::string>();
  settings->take<bool>();
  for (int number = 0; number < 2; ++number) settings->take<int64_t>();
  settings->take<bool>();
  return activation;
}

}  // namespace

Tensor linear_step(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   SettingsReader* settings, Repeat* repeat) {
  const int64_t most_rows = settings->take<int64_t>();
  const IntList s = input.sizes(), w = weight.sizes();
  TORCHCONV_CHECK(s.size() == 4 && s[0] > 0 && s[2] == 1 && s[3] == 1 && input.stride(1) == 1 &&
                      (s[0] == 1 || input.stride(0) == s[1]),
                  "expected dense images of one pixel, but got input of size ", to_string(s));
  TORCHCONV_CHECK(w.size() == 2 && w[1] == s[1], "a matrix of size ", to_string(w),
                  " takes no rows of ", s[1]);
  const int64_t rows = s[0], channels = s[1], filters = w[0];
  if (rows <= most_rows && weight.is_contiguous())
    return conv2d_step(pixels_of(input, rows, channels), pixels_of(weight, filters, channels), bias,
                       std::nullopt, settings, repeat);
  const Tensor x =
      view(input, std::array<int64_t, 2>{rows, channels}, std::array<int64_t, 2>{channels, 1});
  const Tensor y = activate(activation_of(settings), aten("aten::linear", "", x, weight, bias));
  return pixels_of(y, rows, filters);
}

}  // namespace torchconv::ops
