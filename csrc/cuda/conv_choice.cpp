// THE table of the GPU's convolution algorithms.
//
//   groups == C                                    depthwise
//   groups of several channels,                    3x3 of 32 or 64 channels and filters, for 16-bit
//                                                  types, wgmma (Hopper); else mma.sync for 16-bit
//                                                  types (Ampere and later):
//                                                  of as many filters by kernels of their own,
//                                                  other wide ones as without groups; else
//                                                  direct, of many channels a group in NHWC, but
//                                                  float32's fprop of 64 channels and filters SIMT
//   16-bit types, and float32 where TF32 may be,   mma.sync (Ampere and later) where it takes NCHW
//   products long and wide enough for a tile       as it lies: 1x1, and stems of few channels;
//                                                  in NHWC CUTLASS (Hopper), else mma.sync
//   float32 where TF32 may not be, 3x3, stride 1   Winograd (Ampere and later) where it is allowed
//   and 32 channels or more on both sides
//   the rest                                       SIMT; dgrad of at most four channels over NCHW
//                                                  alone where simt_few_dgrad.cu takes it
//
// The direct kernels of groups store sums that have had their bias, and activation, alone: where a
// residual is added before it, the next in line computes them (of groups == C, the depthwise kernel
// for any taps).
#include "cuda/conv_choice.h"

#include <algorithm>

#include "cuda/simt_few_dgrad.h"
#include "cuda/winograd.h"

namespace torchconv::cuda {
namespace {

// Below this a tensor core's tile is mostly padding, and making NHWC of an image takes longer than
// the products.
constexpr int64_t kLeastFilters = 8;
constexpr int64_t kLeastTerms = 16;

bool rounds_factors(const ConvProblem& p, const Queue& queue) {
  return p.dtype == DType::kFloat16 || p.dtype == DType::kBFloat16 ||
         (p.dtype == DType::kFloat32 && queue.allow_tf32());
}

// The direct kernels of groups share what they load between channels in NHWC, between pixels in
// NCHW: of so many channels a group a copy in NHWC costs less than it saves.
Layout layout_of_groups(const ConvProblem& p, Pass pass) {
  const int64_t least = pass == Pass::kFprop ? 16 : 4;
  return std::min(p.C, p.K) / p.groups >= least ? Layout::kNHWC : p.layout;
}

bool empty(const ConvProblem& p) { return p.N == 0 || p.C == 0 || p.K == 0; }

}  // namespace

ConvPlan plan_conv(const ConvProblem& p, Pass pass, const Extras& extras, const Queue& queue) {
  if (empty(p)) return {ConvAlgorithm::kSimt, p};
  if (p.groups > 1) {
    if (depthwise_takes(p, pass)) return {ConvAlgorithm::kDepthwise, p};
    ConvProblem channels_last = p;
    channels_last.layout = channels_last.weight_layout = Layout::kNHWC;
    channels_last.flip = false;
    if (cutlass_takes(channels_last, pass, extras.preactivation, extras.residual, queue))
      return {ConvAlgorithm::kCutlass, channels_last};
    if (grouped_mma_takes(channels_last, pass, queue))
      return {ConvAlgorithm::kGroupedMma, channels_last};
    if (mma_takes(channels_last, pass, queue)) return {ConvAlgorithm::kMma, channels_last};
    ConvProblem direct = p;
    direct.layout = layout_of_groups(p, pass);
    if (!extras.residual && grouped_takes(direct, pass)) return {ConvAlgorithm::kGrouped, direct};
    return {ConvAlgorithm::kSimt, p};
  }
  if (!rounds_factors(p, queue)) {
    if (queue.allow_winograd() && winograd_takes(p, pass, queue))
      return {ConvAlgorithm::kWinograd, p};
    ConvProblem planes = p;
    planes.layout = Layout::kNCHW;
    if (pass == Pass::kDgrad && simt_few_dgrad_takes(planes)) return {ConvAlgorithm::kSimt, planes};
  }
  if (queue.capability < 80 || p.K < kLeastFilters || p.C * p.R * p.S < kLeastTerms ||
      !rounds_factors(p, queue))
    return {ConvAlgorithm::kSimt, p};
  // Of several taps the kernels over NCHW add no residual.
  if (p.layout == Layout::kNCHW && (!extras.residual || p.R * p.S == 1) &&
      mma_takes(p, pass, queue))
    return {ConvAlgorithm::kMma, p};
  ConvProblem dense = p;
  dense.layout = Layout::kNHWC;
  // Of dgrad it turns the filters from where they lie.
  if (pass == Pass::kDgrad && cutlass_takes(dense, pass, false, false, queue))
    return {ConvAlgorithm::kCutlass, dense};
  dense.weight_layout = Layout::kNHWC;
  dense.flip = false;
  if (cutlass_takes(dense, pass, extras.preactivation, extras.residual, queue))
    return {ConvAlgorithm::kCutlass, dense};
  if (mma_takes(dense, pass, queue)) return {ConvAlgorithm::kMma, dense};
  return {ConvAlgorithm::kSimt, p};
}

}  // namespace torchconv::cuda
