// The convolution passes on tensor cores, as conv_passes.h has them: what they take, and how each
// becomes a GatherProblem (mma_gather.h) or a WgradProblem (mma_wgrad.h); 1x1 over NCHW is
// mma_planes.h's, and few channels are mma_patch.h's. Of several groups it is fprop and dgrad of
// wide ones, 16-bit over NHWC.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <numeric>

#include "core/range.h"
#include "cuda/conv_layout.h"
#include "cuda/conv_passes.h"
#include "cuda/mma_gather.h"
#include "cuda/mma_patch.h"
#include "cuda/mma_planes.h"
#include "cuda/mma_wgrad.h"

namespace torchconv::cuda {
namespace {

// Coordinates of one axis, moved by any tap, are far from the ends of int32.
bool axis_fits(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
               int64_t pad) {
  constexpr int64_t kFar = int64_t{1} << 28, kStep = int64_t{1} << 24;
  return size < kFar && outputs < kFar && taps < kStep && stride < kStep && dilation < kStep &&
         std::abs(pad) < kFar && (outputs - 1) * stride < kFar && (taps - 1) * dilation < kFar;
}

MmaAxis forward_axis(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
                     int64_t pad) {
  return {static_cast<int32_t>(size),
          static_cast<int32_t>(outputs),
          static_cast<int32_t>(taps),
          static_cast<int32_t>(stride),
          static_cast<int32_t>(dilation),
          static_cast<int32_t>(pad),
          /*common=*/1,
          /*phases=*/1};
}

MmaAxis backward_axis(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t dilation,
                      int64_t pad) {
  MmaAxis axis = forward_axis(outputs, size, taps, stride, dilation, pad);
  axis.common = std::gcd(axis.stride, axis.dilation);
  axis.phases = std::min(axis.stride, axis.outputs);
  return axis;
}

// The divisors of a flattened reduction.
void set_divisors(GatherProblem& g) {
  g.channel_divisor = Divisor(g.channels);
  g.least_taps = g.backward ? std::max(g.w.taps / (g.w.stride / g.w.common), 1) : g.w.taps;
  g.few_taps = Divisor(g.least_taps);
  g.more_taps = Divisor(g.least_taps + 1);
}

template <typename T>
bool in_vectors(const void* p, int64_t channels) {
  return aligned<T>(p, kLanes<T>) && channels % kLanes<T> == 0;
}

// The channels that x and w are given for units of 16 bytes, which copies are filled up to. One or
// two are fewer bytes as they are.
template <typename T>
int64_t filled_channels(const ConvProblem& p) {
  return p.C < 3 ? p.C : round_up(p.C, kLanes<T>);
}

// Rows of C channels: themselves, or a copy of them with more.
template <typename T>
const void* fill_channels(const ConvProblem& p, const void* source, int64_t rows, int64_t filled,
                          const Queue& queue) {
  if (filled == p.C) return source;
  T* copy = queue.scratch<T>(rows * filled);
  resize_rows(p.dtype, source, copy, rows, p.C, filled, queue);
  return copy;
}

// Groups that fill a tile.
bool wide_groups(const ConvProblem& p) {
  constexpr int64_t kLeast = 32, kLane = kLanes<Half>;
  const int64_t C = p.C / p.groups, K = p.K / p.groups;
  return p.dtype != DType::kFloat32 && p.layout == Layout::kNHWC && C >= kLeast && K >= kLeast &&
         C % kLane == 0 && K % kLane == 0;
}

}  // namespace

bool mma_takes(const ConvProblem& p, Pass pass, const Queue& queue) {
  const bool type =
      p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat32;
  if (queue.capability < 80 || !type) return false;
  if (p.groups != 1 && (pass == Pass::kWgrad || !wide_groups(p))) return false;
  if (p.layout == Layout::kNHWC
          ? p.weight_layout != Layout::kNHWC || p.flip
          : !planes_take(p, pass) && (pass != Pass::kFprop || !patch_takes(p, queue)))
    return false;
  for (const int64_t size : {p.N, p.C, p.K, p.P, p.Q})
    if (size <= 0) return false;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (!axis_fits(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top) ||
      !axis_fits(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left) || p.H * p.W >= kMost ||
      p.P * p.Q >= kMost || p.R * p.S >= kMost || std::max(p.C, p.K) + 8 >= kMost / (p.R * p.S))
    return false;
  // Fewer than 2^31 blocks, of 64 x 64 sums: the phases of dx, each rounded up to whole rows and
  // columns, have less than four times its pixels; parts of dw that are not for length are few.
  const int64_t pixels = std::max(p.N * p.P * p.Q, p.N * p.H * p.W);
  const int64_t phases = std::min(p.stride_h, p.H) * std::min(p.stride_w, p.W);
  const int64_t tiles_m = ceil_div(pixels, 64) * 4 + phases;
  const int64_t tiles_n = p.groups * ceil_div(std::max(p.C, p.K) / p.groups, 64);
  const int64_t tiles_dw = ceil_div(p.K, 64) * ceil_div(p.R * p.S * (p.C + 8), 64) + 8192;
  return tiles_m < kMost / tiles_n && tiles_dw < kMost / (pixels / (int64_t{1} << 24) + 1);
}

void mma_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
               const void* residual, void* y, void* preactivation, const Queue& queue) {
  if (p.layout == Layout::kNCHW && planes_take(p, Pass::kFprop))
    return planes_fprop(p, x, w, bias, residual, y, preactivation, queue);
  if (residual == nullptr && patch_takes(p, queue))
    return with_tensor_core_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      run_patch(p, static_cast<const T*>(x), static_cast<const T*>(w),
                Epilogue<T>{static_cast<const T*>(bias), static_cast<T*>(y),
                            static_cast<T*>(preactivation), p.activation},
                queue);
    });
  GatherProblem g{};
  g.batch = p.N;
  g.groups = static_cast<int32_t>(p.groups);
  g.outputs = static_cast<int32_t>(p.K / p.groups);
  g.h = forward_axis(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top);
  g.w = forward_axis(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left);
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    // More than twice the terms take longer than units of two bytes (seen on a Hopper GPU).
    const int64_t most = filled_channels<T>(p), filled = most <= 2 * p.C ? most : p.C;
    const int64_t C = filled / p.groups;
    g.image = fill_channels<T>(p, x, p.N * p.H * p.W, filled, queue);
    g.filters = fill_channels<T>(p, w, p.K * p.R * p.S, filled, queue);
    g.filter_pitch = p.R * p.S * C;
    g.filter_line = p.S * C;
    g.filter_column = C;
    g.filter_group = g.outputs * g.filter_pitch;
    g.channels = static_cast<int32_t>(C);
    set_divisors(g);
    g.vectors = in_vectors<T>(g.image, C) && in_vectors<T>(g.filters, C);
    g.vector_outputs = in_vectors<T>(y, g.outputs) &&
                       (preactivation == nullptr || in_vectors<T>(preactivation, g.outputs)) &&
                       (residual == nullptr || in_vectors<T>(residual, g.outputs));
    run_gather(
        g,
        Epilogue<T>{static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(preactivation),
                    p.activation, static_cast<const T*>(residual)},
        queue);
  });
}

void mma_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx, const Queue& queue) {
  if (p.layout == Layout::kNCHW) return planes_dgrad(p, dz, w, dx, queue);
  if (patch_dgrad_takes(p, queue))
    return with_tensor_core_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      run_patch_dgrad(p, static_cast<const T*>(dz), static_cast<const T*>(w), static_cast<T*>(dx),
                      queue);
    });
  GatherProblem g{};
  g.image = dz;
  const int64_t C = p.C / p.groups, K = p.K / p.groups;
  g.filter_pitch = K;
  g.filter_line = p.S * C * K;
  g.filter_column = C * K;
  g.filter_group = p.R * p.S * C * K;
  g.batch = p.N;
  g.groups = static_cast<int32_t>(p.groups);
  g.channels = static_cast<int32_t>(K);
  g.outputs = static_cast<int32_t>(C);
  g.h = backward_axis(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top);
  g.w = backward_axis(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left);
  g.backward = true;
  set_divisors(g);
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    // R x S x C x K: the reduction over K inside, as the kernel reads filters.
    T* filters = queue.scratch<T>(p.K * p.R * p.S * C);
    transpose(p.dtype, w, filters, p.groups, K, p.R * p.S * C, queue);
    g.filters = filters;
    g.vectors = in_vectors<T>(dz, K);
    g.vector_outputs = in_vectors<T>(dx, C);
    run_gather(g, Epilogue<T>{nullptr, static_cast<T*>(dx), nullptr, Activation::kNone}, queue);
  });
}

void mma_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw, const Queue& queue) {
  if (p.layout == Layout::kNCHW) return planes_wgrad(p, dz, x, dw, queue);
  if (patch_wgrad_takes(p, queue))
    return with_tensor_core_type(p.dtype, [&](auto element) {
      using T = decltype(element);
      run_patch_wgrad(p, static_cast<const T*>(dz), static_cast<const T*>(x), static_cast<T*>(dw),
                      queue);
    });
  WgradProblem g{};
  g.dz = dz;
  g.pixels = p.N * p.P * p.Q;
  g.H = static_cast<int32_t>(p.H);
  g.W = static_cast<int32_t>(p.W);
  g.filters = static_cast<int32_t>(p.K);
  g.stride_h = static_cast<int32_t>(p.stride_h);
  g.stride_w = static_cast<int32_t>(p.stride_w);
  g.pad_top = static_cast<int32_t>(p.pad_top);
  g.pad_left = static_cast<int32_t>(p.pad_left);
  g.dilation_h = static_cast<int32_t>(p.dilation_h);
  g.dilation_w = static_cast<int32_t>(p.dilation_w);
  g.plane = Divisor(p.P * p.Q);
  g.line = Divisor(p.Q);
  g.tap_divisor = Divisor(p.S);
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    g.vectors_dz = in_vectors<T>(dz, p.K);
    const int64_t C = filled_channels<T>(p), taps = p.K * p.R * p.S;
    g.x = fill_channels<T>(p, x, p.N * p.H * p.W, C, queue);
    g.dw = C == p.C ? dw : queue.scratch<T>(taps * C);
    g.channels = static_cast<int32_t>(C);
    g.weights = static_cast<int32_t>(p.R * p.S * C);
    g.channel_divisor = Divisor(C);
    g.vectors_x = in_vectors<T>(g.x, C);
    run_wgrad<T>(g, queue);
    if (C != p.C) resize_rows(p.dtype, g.dw, dw, taps, C, p.C, queue);
  });
}

}  // namespace torchconv::cuda
