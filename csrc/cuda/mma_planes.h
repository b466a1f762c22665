// Convolutions of 1x1 kernels on tensor cores over NCHW images as they lie, for each sample
//
//   z (K x pixels) = w (K x C) * x (C x pixels),    dx (C x pixels) = w' (C x K) * dz (K x pixels),
//   dw (K x C) = sum over samples of dz (K x pixels) * x' (pixels x C)
//
// The pixels of all samples are one axis: a tile of outputs x pixels may reach over several
// samples, and a unit of pixels, which is loaded and stored at once, lies in one plane. In z and dx
// the image's slices are rows of pixels, one for each channel, which ldmatrix turns; in dw both
// operands are planes' rows with the reduction inside, and parts of the pixels add up as in
// mma_wgrad.h.
//
// Bound: images read and written once, or 2 * pixels * K * C operations. The order of a sum of z or
// dx is that of the channels, whatever the tile and the batch.
#pragma once

#include "cuda/activation.h"
#include "cuda/conv_passes.h"
#include "cuda/mma_wgrad.h"

namespace torchconv::cuda {

struct PlanesProblem {
  const void* image;    // batch x channels x plane
  const void* filters;  // outputs x channels, units of 16 bytes
  int64_t pixels;       // of all samples
  int32_t channels, outputs;
  Divisor plane;
  bool vector_outputs;  // units can be stored to what the epilogue writes
  uint32_t tiles_m, tiles_n;
};

// f(T{}) for the element types of the tensor cores.
template <typename F>
void with_tensor_core_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat16:
      return f(Half{});
    case DType::kBFloat16:
      return f(BFloat16{});
    default:
      return f(float{});
  }
}

// Planes of a multiple of four pixels.
bool planes_take(const ConvProblem& p, Pass pass);
void planes_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                  const void* residual, void* y, void* preactivation, const Queue& queue);
void planes_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                  const Queue& queue);
void planes_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                  const Queue& queue);

template <typename T>
void run_planes(PlanesProblem p, const Epilogue<T>& epilogue, const Queue& queue);
extern template void run_planes(PlanesProblem, const Epilogue<Half>&, const Queue&);
extern template void run_planes(PlanesProblem, const Epilogue<BFloat16>&, const Queue&);
extern template void run_planes(PlanesProblem, const Epilogue<float>&, const Queue&);

// The same by filters that stay in shared memory, which may lie as channels x outputs, `turned`.
// False where it does not take the problem. 16-bit types.
template <typename T>
bool run_resident(const PlanesProblem& p, bool turned, const Epilogue<T>& epilogue,
                  const Queue& queue);
extern template bool run_resident(const PlanesProblem&, bool, const Epilogue<Half>&, const Queue&);
extern template bool run_resident(const PlanesProblem&, bool, const Epilogue<BFloat16>&,
                                  const Queue&);

// dw as run_planes_wgrad has it, and what to_dx writes from w, unless to_dx.y is null. 16-bit
// types.
struct PlanesGradients {
  WgradProblem dw;
  const void* w;  // filters x channels
};
template <typename T>
void run_planes_gradients(PlanesGradients p, const Epilogue<T>& to_dx, const Queue& queue);
extern template void run_planes_gradients(PlanesGradients, const Epilogue<Half>&, const Queue&);
extern template void run_planes_gradients(PlanesGradients, const Epilogue<BFloat16>&, const Queue&);

// Of a WgradProblem it reads dz (N x filters x plane), x (N x channels x plane), dw, pixels,
// filters, channels, weights (the same number) and plane.
template <typename T>
void run_planes_wgrad(WgradProblem p, const Queue& queue);
extern template void run_planes_wgrad<Half>(WgradProblem, const Queue&);
extern template void run_planes_wgrad<BFloat16>(WgradProblem, const Queue&);
extern template void run_planes_wgrad<float>(WgradProblem, const Queue&);

}  // namespace torchconv::cuda
