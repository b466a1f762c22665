// The grouped convolution passes on tensor cores, as conv_passes.h has them: what they take, and
// how each becomes a problem of grouped_mma.h.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <numeric>

#include "core/range.h"
#include "cuda/conv_layout.h"
#include "cuda/conv_passes.h"
#include "cuda/grouped_mma_plan.h"
#include "cuda/grouped_mma_rows.h"

namespace torchconv::cuda {
namespace {

template <typename F>
void with_half_type(DType dtype, F&& f) {
  return dtype == DType::kFloat16 ? f(Half{}) : f(BFloat16{});
}

GroupedChannels channels_of(const ConvProblem& p) {
  GroupedChannels c{};
  c.channels = static_cast<int32_t>(p.C);
  c.group = static_cast<int32_t>(p.C / p.groups);
  c.group_units = std::max(c.group / kUnitChannels, 1);
  c.slab_units = kSlabUnits / c.group_units * c.group_units;
  c.slabs = static_cast<int32_t>(ceil_div(p.C, int64_t{c.slab_units} * kUnitChannels));
  c.by_group_units = Divisor(c.group_units);
  return c;
}

MmaAxis axis_of(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
                int64_t pad, bool backward) {
  MmaAxis axis{};
  axis.source = static_cast<int32_t>(backward ? outputs : size);
  axis.outputs = static_cast<int32_t>(backward ? size : outputs);
  axis.taps = static_cast<int32_t>(taps);
  axis.stride = static_cast<int32_t>(stride);
  axis.dilation = static_cast<int32_t>(dilation);
  axis.pad = static_cast<int32_t>(pad);
  axis.common = backward ? std::gcd(axis.stride, axis.dilation) : 1;
  axis.phases = backward ? std::min(axis.stride, axis.outputs) : 1;
  return axis;
}

// What the problems of all kernels have.
template <typename Problem>
Problem problem_of(const ConvProblem& p, bool backward) {
  Problem g{};
  g.c = channels_of(p);
  g.batch = static_cast<int32_t>(p.N);
  g.h = axis_of(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top, backward);
  g.w = axis_of(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left, backward);
  return g;
}

GroupedGather gather_of(const ConvProblem& p, bool backward) {
  auto g = problem_of<GroupedGather>(p, backward);
  g.backward = backward;
  return g;
}

GroupedRows rows_of(const ConvProblem& p, bool backward) {
  auto g = problem_of<GroupedRows>(p, backward);
  g.backward = backward;
  return g;
}

GroupedWgrad wgrad_of(const ConvProblem& p) { return problem_of<GroupedWgrad>(p, false); }

GroupedRowsWgrad rows_wgrad_of(const ConvProblem& p) {
  return problem_of<GroupedRowsWgrad>(p, false);
}

// Tensors in which 16 bytes can be loaded and stored at once: themselves, or copies.
const void* to_vectors(const ConvProblem& p, const void* source, int64_t count,
                       const Queue& queue) {
  if (aligned<Half>(source, kUnitChannels)) return source;
  void* copy = queue.scratch<Half>(count);
  transpose(p.dtype, source, copy, 1, 1, count, queue);
  return copy;
}
template <typename T>
class VectorOutput {
 public:
  VectorOutput(const ConvProblem& p, void* target, int64_t count, const Queue& queue)
      : dtype_(p.dtype), target_(target), count_(count), queue_(queue) {
    copies_ = target != nullptr && !aligned<T>(target, kUnitChannels);
    data_ = copies_ ? queue.scratch<T>(count) : static_cast<T*>(target);
  }
  T* data() const { return data_; }
  void finish() const {
    if (copies_) transpose(dtype_, data_, target_, 1, 1, count_, queue_);
  }

 private:
  DType dtype_;
  void* target_;
  int64_t count_;
  const Queue& queue_;
  bool copies_;
  T* data_;
};

}  // namespace

bool grouped_mma_takes(const ConvProblem& p, Pass pass, const Queue& queue) {
  if (queue.capability < 80 || (p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) ||
      p.layout != Layout::kNHWC || p.weight_layout != Layout::kNHWC || p.flip || p.K != p.C)
    return false;
  const int64_t group = p.C / p.groups;
  if (group > kSlabUnits * kUnitChannels || p.C % kUnitChannels != 0 ||
      (group % kUnitChannels != 0 && kUnitChannels % group != 0))
    return false;
  constexpr int64_t kMost = int64_t{1} << 31, kFar = int64_t{1} << 24;
  for (const int64_t size : {p.N, p.P, p.Q})
    if (size <= 0) return false;
  for (const int64_t size :
       {p.H, p.W, p.P, p.Q, p.R, p.S, p.P * p.stride_h, p.Q * p.stride_w, p.R * p.dilation_h,
        p.S * p.dilation_w, std::abs(p.pad_top), std::abs(p.pad_left)})
    if (size >= kFar) return false;
  if (p.N * p.C * p.H * p.W >= kMost || p.N * p.K * p.P * p.Q >= kMost ||
      p.K * p.R * p.S * group >= kMost / 64)
    return false;
  if (pass == Pass::kWgrad) {
    GroupedRowsWgrad g = rows_wgrad_of(p);
    if (plan_grouped_rows_wgrad(g, queue)) return true;
  } else {
    GroupedRows g = rows_of(p, pass == Pass::kDgrad);
    if (plan_grouped_rows(g, queue)) return true;
  }
  // Filters of wide groups leave room for one block of the forward pass, whose pixels are many.
  if (pass == Pass::kFprop && group > 32) return false;
  if (pass == Pass::kWgrad) {
    GroupedWgrad g = wgrad_of(p);
    return plan_grouped_wgrad(g, queue);
  }
  GroupedGather g = gather_of(p, pass == Pass::kDgrad);
  return plan_grouped_gather(g, queue);
}

void grouped_mma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                       const void* residual, void* y, void* preactivation, const Queue& queue) {
  GroupedRows rows = rows_of(p, false);
  const bool by_rows = plan_grouped_rows(rows, queue);
  GroupedGather g = gather_of(p, false);
  if (!by_rows) plan_grouped_gather(g, queue);
  g.image = rows.image = to_vectors(p, x, p.N * p.C * p.H * p.W, queue);
  g.filters = rows.filters = to_vectors(p, w, p.K * p.R * p.S * g.c.group, queue);
  with_half_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t count = p.N * p.K * p.P * p.Q;
    const VectorOutput<T> out(p, y, count, queue), z(p, preactivation, count, queue);
    const void* added = residual == nullptr ? nullptr : to_vectors(p, residual, count, queue);
    const Epilogue<T> epilogue{static_cast<const T*>(bias), out.data(), z.data(), p.activation,
                               static_cast<const T*>(added)};
    if (by_rows)
      run_grouped_rows(rows, epilogue, queue);
    else
      run_grouped_gather(g, epilogue, queue);
    out.finish();
    z.finish();
  });
}

void grouped_mma_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                       const Queue& queue) {
  GroupedRows rows = rows_of(p, true);
  const bool by_rows = plan_grouped_rows(rows, queue);
  GroupedGather g = gather_of(p, true);
  if (!by_rows) plan_grouped_gather(g, queue);
  g.image = rows.image = to_vectors(p, dz, p.N * p.K * p.P * p.Q, queue);
  g.filters = rows.filters = to_vectors(p, w, p.K * p.R * p.S * g.c.group, queue);
  with_half_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    const VectorOutput<T> out(p, dx, p.N * p.C * p.H * p.W, queue);
    const Epilogue<T> epilogue{nullptr, out.data(), nullptr, Activation::kNone};
    if (by_rows)
      run_grouped_rows(rows, epilogue, queue);
    else
      run_grouped_gather(g, epilogue, queue);
    out.finish();
  });
}

void grouped_mma_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                       const Queue& queue) {
  GroupedRowsWgrad rows = rows_wgrad_of(p);
  const bool by_rows = plan_grouped_rows_wgrad(rows, queue);
  GroupedWgrad g = wgrad_of(p);
  if (!by_rows) plan_grouped_wgrad(g, queue);
  g.dz = rows.dz = to_vectors(p, dz, p.N * p.K * p.P * p.Q, queue);
  g.x = rows.x = to_vectors(p, x, p.N * p.C * p.H * p.W, queue);
  if (by_rows) {
    rows.dw = dw;
    with_half_type(p.dtype,
                   [&](auto element) { run_grouped_rows_wgrad<decltype(element)>(rows, queue); });
    return;
  }
  g.dw = dw;
  with_half_type(p.dtype, [&](auto element) { run_grouped_wgrad<decltype(element)>(g, queue); });
}

}  // namespace torchconv::cuda
