// Which kernel computes a pass of a grouped convolution.
#include <algorithm>

#include "cuda/grouped.h"

namespace torchconv::cuda {
namespace {

// Wider groups fill the tiles of a matrix product: those of simt_planes.cu and simt_gather.cu, of
// which float32's do so from 64 on and share more of what they load.
constexpr int64_t kMostChannels = 64;

bool fills_tiles(const ConvProblem& p, Pass pass) {
  return p.dtype == DType::kFloat32 && pass == Pass::kFprop &&
         std::min(p.C, p.K) / p.groups >= kMostChannels;
}

void gather(const ConvProblem& p, Pass pass, const void* in, const void* w, const void* bias,
            void* out, void* preactivation, const Queue& queue) {
  const Sampling sampling = sampling_of(p, pass);
  const Activation activation = pass == Pass::kDgrad ? Activation::kNone : p.activation;
  const auto compute = p.layout == Layout::kNCHW ? grouped_planes : grouped_channels;
  compute(p.dtype, sampling, gather_of(p, pass), in, w, bias, out, preactivation, activation,
          queue);
}

}  // namespace

bool grouped_takes(const ConvProblem& p, Pass pass) {
  const Sampling sampling = sampling_of(p, pass);
  return is_float(p.dtype) && !fills_tiles(p, pass) && p.R == 3 && sampling != Sampling::kNone &&
         sampling != Sampling::kDilated && p.C / p.groups <= kMostChannels &&
         p.K / p.groups <= kMostChannels && positions_fit(p);
}

void grouped_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                   void* preactivation, const Queue& queue) {
  gather(p, Pass::kFprop, x, w, bias, y, preactivation, queue);
}

void grouped_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                   const Queue& queue) {
  gather(p, Pass::kDgrad, dz, w, nullptr, dx, nullptr, queue);
}

void grouped_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                   const Queue& queue) {
  const auto compute = p.layout == Layout::kNCHW ? grouped_planes_wgrad : grouped_channels_wgrad;
  compute(p.dtype, sampling_of(p, Pass::kWgrad), gather_of(p, Pass::kFprop), dz, x, dw, queue);
}

}  // namespace torchconv::cuda
