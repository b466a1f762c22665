// See ops/gate.h: which tensors the kernel of cpu/gate.h is for.
#include "ops/cpu/gate.h"

#include "cpu/gate.h"
#include "ops/execution.h"

namespace torchconv::ops {
namespace {

// Sizes and strides leave no choice of layout, and are dense in one.
std::optional<Layout> layout_of(const Tensor& t) {
  const IntList s = t.sizes(), strides = t.strides();
  if (s.size() != 4 || s[0] < 1 || s[1] < 2 || s[2] < 2 || s[3] < 2) return std::nullopt;
  if (strides[0] != s[1] * s[2] * s[3]) return std::nullopt;
  if (strides[3] == 1 && strides[2] == s[3] && strides[1] == s[2] * s[3]) return Layout::kNCHW;
  if (strides[1] == 1 && strides[3] == s[1] && strides[2] == s[1] * s[3]) return Layout::kNHWC;
  return std::nullopt;
}

bool is_gate_of(const Tensor& gate, IntList s) {
  const IntList sizes = gate.sizes(), strides = gate.strides();
  return sizes.size() == 4 && sizes[0] == s[0] && sizes[1] == s[1] && sizes[2] == 1 &&
         sizes[3] == 1 && strides[1] == 1 && (s[0] == 1 || strides[0] == s[1]);
}

// Elements of gates that no second thread would repay.
constexpr int64_t kFewElements = 1 << 13;

}  // namespace

std::optional<Tensor> hardsigmoid(const Tensor& x, Repeat* repeat) {
  const ScalarType type = x.scalar_type();
  const int64_t count = x.numel();
  const IntList s = x.sizes();
  if ((type != ScalarType::Float && type != ScalarType::Double) || count > kFewElements ||
      s.size() != 4 || s[2] != 1 || s[3] != 1 || !x.is_contiguous())
    return std::nullopt;
  const DType dtype = dtype_of(x, "hardsigmoid");
  const Tensor y = new_tensor(x, s, type, Layout::kNCHW);
  cpu::hardsigmoid(dtype, count, x.const_data_ptr(), y.mutable_data_ptr());
  if (repeat != nullptr)
    *repeat = [dtype, count](const StepMemory& m) {
      cpu::hardsigmoid(dtype, count, m.tensors[0], m.result);
    };
  return y;
}

std::optional<Tensor> gate_channels(const Tensor& x, const Tensor& gate, bool in_place,
                                    size_t gate_index, Repeat* repeat) {
  const ScalarType type = x.scalar_type();
  if ((type != ScalarType::Float && type != ScalarType::Double) || gate.scalar_type() != type)
    return std::nullopt;
  const std::optional<Layout> layout = layout_of(x);
  const IntList s = x.sizes();
  if (!layout.has_value() || !is_gate_of(gate, s)) return std::nullopt;
  const Tensor y = in_place ? x : new_tensor(x, s, type, *layout);
  const cpu::GateProblem p{s[0], s[1], s[2] * s[3], *layout, dtype_of(x, "mul")};
  cpu::gate_channels(p, x.const_data_ptr(), gate.const_data_ptr(), y.mutable_data_ptr(),
                     torch_threads());
  if (repeat != nullptr)
    *repeat = [p, gate_index](const StepMemory& m) {
      cpu::gate_channels(p, m.tensors[1 - gate_index], m.tensors[gate_index], m.result,
                         torch_threads());
    };
  return y;
}

}  // namespace torchconv::ops
