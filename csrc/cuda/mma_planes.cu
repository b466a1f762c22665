// What mma_planes.h takes, and how each pass becomes a problem of its kernels.
#include "core/range.h"
#include "cuda/conv_layout.h"
#include "cuda/conv_planes.h"
#include "cuda/mma_planes.h"

namespace torchconv::cuda {
namespace {

// A tensor that may begin at any element, or its copy where units of 16 bytes can be loaded.
template <typename T>
const void* in_units(DType dtype, const void* source, int64_t elements, const Queue& queue) {
  if (aligned<T>(source, kLanes<T>)) return source;
  T* copy = queue.scratch<T>(elements);
  pack_weights(dtype, source, Layout::kNHWC, /*flip=*/false, copy, 1, elements, 1, 1, queue);
  return copy;
}

// out (outputs x pixels) = filters (outputs x channels, or turned) * image (channels x pixels).
template <typename T>
void multiply(const ConvProblem& p, const void* image, const void* filters, bool turned,
              int64_t channels, int64_t outputs, const Epilogue<T>& epilogue, const Queue& queue) {
  PlanesProblem g{};
  g.pixels = p.N * p.H * p.W;
  g.image = in_units<T>(p.dtype, image, g.pixels * channels, queue);
  g.filters = in_units<T>(p.dtype, filters, outputs * channels, queue);
  g.channels = static_cast<int32_t>(channels);
  g.outputs = static_cast<int32_t>(outputs);
  g.plane = Divisor(p.H * p.W);
  g.vector_outputs = aligned<T>(epilogue.y, kLanes<T>) &&
                     aligned<T>(epilogue.preactivation, kLanes<T>) &&
                     aligned<T>(epilogue.residual, kLanes<T>);
  if constexpr (sizeof(T) == 2)
    if (run_resident(g, turned, epilogue, queue)) return;
  if (turned) {
    T* rows = queue.scratch<T>(outputs * channels);
    transpose(p.dtype, filters, rows, 1, channels, outputs, queue);
    g.filters = rows;
  }
  run_planes(g, epilogue, queue);
}

WgradProblem wgrad_problem(const ConvProblem& p, void* dw) {
  WgradProblem g{};
  g.pixels = p.N * p.H * p.W;
  g.dw = dw;
  g.channels = g.weights = static_cast<int32_t>(p.C);
  g.filters = static_cast<int32_t>(p.K);
  g.plane = Divisor(p.H * p.W);
  return g;
}

}  // namespace

bool planes_take(const ConvProblem& p, Pass pass) {
  const bool same_pixels = p.R * p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_top == 0 &&
                           p.pad_left == 0 && p.P == p.H && p.Q == p.W;
  const int64_t reduced = pass == Pass::kDgrad ? p.K : p.C;
  const int64_t lanes = p.dtype == DType::kFloat32 ? 4 : 8;
  return same_pixels && p.H * p.W % 4 == 0 && (pass == Pass::kWgrad || reduced % lanes == 0);
}

void planes_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                  const void* residual, void* y, void* preactivation, const Queue& queue) {
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    multiply(
        p, x, w, /*turned=*/false, p.C, p.K,
        Epilogue<T>{static_cast<const T*>(bias), static_cast<T*>(y), static_cast<T*>(preactivation),
                    p.activation, static_cast<const T*>(residual)},
        queue);
  });
}

void planes_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                  const Queue& queue) {
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    multiply(p, dz, w, /*turned=*/true, p.K, p.C,
             Epilogue<T>{nullptr, static_cast<T*>(dx), nullptr, Activation::kNone}, queue);
  });
}

bool planes_gradients_take(const ConvProblem& p, const Queue& queue) {
  constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 20);
  const auto few = [](int64_t size) { return size <= 64; };
  // These devices have the shared memory.
  return (queue.capability == 90 || queue.capability == 100) && p.dtype != DType::kFloat32 &&
         p.layout == Layout::kNCHW && planes_take(p, Pass::kDgrad) &&
         planes_take(p, Pass::kWgrad) && p.H * p.W % 8 == 0 && p.C % 8 == 0 &&
         p.N * p.H * p.W <= kMostPixels && few(p.K) != few(p.C) && std::max(p.K, p.C) <= 256;
}

void planes_gradients(const ConvProblem& p, const void* dz, const void* x, const void* w, void* dx,
                      void* dw, const Queue& queue) {
  WgradProblem g = wgrad_problem(p, dw);
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) {
      g.dz = in_units<T>(p.dtype, dz, g.pixels * p.K, queue);
      g.x = in_units<T>(p.dtype, x, g.pixels * p.C, queue);
      if (dx != nullptr) w = in_units<T>(p.dtype, w, p.K * p.C, queue);
      const bool aligned_dx = aligned<T>(dx, kLanes<T>);
      T* to = aligned_dx ? static_cast<T*>(dx) : queue.scratch<T>(g.pixels * p.C);
      run_planes_gradients(PlanesGradients{g, w},
                           Epilogue<T>{nullptr, to, nullptr, Activation::kNone}, queue);
      if (!aligned_dx)
        pack_weights(p.dtype, to, Layout::kNHWC, /*flip=*/false, dx, 1, g.pixels * p.C, 1, 1,
                     queue);
    }
  });
}

void planes_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                  const Queue& queue) {
  if (planes_gradients_take(p, queue))
    return planes_gradients(p, dz, x, nullptr, nullptr, dw, queue);
  WgradProblem g = wgrad_problem(p, dw);
  with_tensor_core_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    g.dz = in_units<T>(p.dtype, dz, g.pixels * p.K, queue);
    g.x = in_units<T>(p.dtype, x, g.pixels * p.C, queue);
    run_planes_wgrad<T>(g, queue);
  });
}

}  // namespace torchconv::cuda
