// Which kernel computes a pass of a depthwise convolution.
#include "cuda/depthwise.h"

namespace torchconv::cuda {
namespace {

bool pixels_contiguous(const ConvProblem& p) {
  return p.layout == Layout::kNCHW || (p.C == 1 && p.K == 1);
}

void gather(const ConvProblem& p, Pass pass, const void* in, const void* w, const void* bias,
            const void* residual, void* out, void* preactivation, const Queue& queue) {
  const Sampling sampling = sampling_of(p, pass);
  const Activation activation = pass == Pass::kDgrad ? Activation::kNone : p.activation;
  if (sampling == Sampling::kNone || residual != nullptr)
    return depthwise_taps(p, pass, in, w, bias, residual, out, preactivation, queue);
  const Gather g = gather_of(p, pass);
  if (pixels_contiguous(p)) {
    if (!depthwise_strips(p.dtype, p.R, sampling, g, in, w, bias, out, preactivation, activation,
                          queue))
      depthwise_planes(p.dtype, p.R, sampling, g, in, w, bias, out, preactivation, activation,
                       queue);
  } else if ((preactivation != nullptr ||
              (!depthwise_channel_mma(p.dtype, p.R, sampling, g, in, w, bias, out, activation,
                                      queue) &&
               !depthwise_channel_strips(p.dtype, p.R, sampling, g, in, w, bias, out, activation,
                                         queue))) &&
             !depthwise_channels(p.dtype, p.R, sampling, g, in, w, bias, out, preactivation,
                                 activation, queue))
    depthwise_taps(p, pass, in, w, bias, nullptr, out, preactivation, queue);
}

}  // namespace

bool depthwise_takes(const ConvProblem& p, Pass pass) {
  // A longer sum loses accuracy when its terms are added one after another; wgrad's are sliced.
  constexpr int64_t kMostTerms = 1024;
  const int64_t filters = pass == Pass::kDgrad ? p.K / p.groups : 1;
  return is_float(p.dtype) && p.groups == p.C && positions_fit(p) &&
         (pass == Pass::kWgrad || filters <= kMostTerms / p.R / p.S);
}

void depthwise_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                     const void* residual, void* y, void* preactivation, const Queue& queue) {
  gather(p, Pass::kFprop, x, w, bias, residual, y, preactivation, queue);
}

void depthwise_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                     const Queue& queue) {
  gather(p, Pass::kDgrad, dz, w, nullptr, nullptr, dx, nullptr, queue);
}

void depthwise_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                     const Queue& queue) {
  const Sampling sampling = sampling_of(p, Pass::kFprop);
  if (sampling == Sampling::kNone) return depthwise_taps_wgrad(p, dz, x, dw, queue);
  const Gather g = gather_of(p, Pass::kFprop);
  if (pixels_contiguous(p)) {
    if (!depthwise_strips_wgrad(p.dtype, p.R, sampling, g, dz, x, dw, queue))
      depthwise_planes_wgrad(p.dtype, p.R, sampling, g, dz, x, dw, queue);
  } else if (!depthwise_mma_wgrad(p.dtype, p.R, sampling, g, dz, x, dw, queue) &&
             !depthwise_channel_strips_wgrad(p.dtype, p.R, sampling, g, dz, x, dw, queue) &&
             !depthwise_channels_wgrad(p.dtype, p.R, sampling, g, dz, x, dw, queue)) {
    depthwise_taps_wgrad(p, dz, x, dw, queue);
  }
}

bool depthwise_gradients(const ConvProblem& p, const void* dz, const void* x, const void* w,
                         void* dx, void* dw, const Queue& queue) {
  return sampling_of(p, Pass::kDgrad) == Sampling::kUnit && !pixels_contiguous(p) &&
         depthwise_channel_gradients(p.dtype, p.R, gather_of(p, Pass::kDgrad), dz, x, w, dx, dw,
                                     queue);
}

}  // namespace torchconv::cuda
