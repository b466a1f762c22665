// See conv_gather.h.
#include "cpu/conv_gather.h"

#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "cpu/band_gemm.h"
#include "cpu/conv_band_gather.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_winograd.h"
#include "cpu/group_gather.h"
#include "cpu/group_winograd.h"
#include "cpu/group_winograd_planes.h"
#include "cpu/inner_gather.h"
#include "cpu/pixel_gemm.h"
#include "cpu/plane_pairs.h"
#include "cpu/plane_taps.h"
#include "cpu/sample_gemm.h"
#include "cpu/shared_taps.h"
#include "cpu/tap_runs.h"
#include "cpu/wide_array.h"
#include "cpu/winograd.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_strided.h"

namespace torchconv::cpu {
namespace {

template <typename T>
ConvBand conv_band(const ConvView& view, ConvAlgorithm algorithm) {
  const bool along_pixels = algorithm == ConvAlgorithm::kBandAlongPixels;
  return ConvBand(view, along_pixels, sizeof(Wide<T>), kLanes<Wide<T>>, 0,
                  !along_pixels && packs_channels(view, kLanes<Wide<T>>));
}

// The same of frozen weights alone.
template <typename T>
int64_t frozen_size(const ConvView& view, ConvAlgorithm algorithm) {
  if (algorithm == ConvAlgorithm::kWinograd) return winograd_weights_size<T>(view, true);
  if constexpr (std::is_same_v<T, float>)
    if (algorithm == ConvAlgorithm::kDepthwiseWinograd)
      return depthwise_winograd_weights_size(view);
  if constexpr (std::is_same_v<T, Wide<T>>)
    if (algorithm == ConvAlgorithm::kDepthwiseColumns)
      return depthwise_columns_weights_size<T>(view);
  return 0;
}

// What an algorithm packs of the weights that is worth keeping from call to call, in elements.
template <typename T>
int64_t packed_size(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
      return winograd_weights_size<T>(view, false);
    case ConvAlgorithm::kStridedWinograd:
      return strided_winograd_weights_size(p);
    case ConvAlgorithm::kDirectProduct:
      return direct_gemm_packs_along<T>(view) ? 0 : direct_gemm_weights_size<T>(view);
    case ConvAlgorithm::kPixelProduct:
      return pixel_gemm_packs_along(view) ? 0 : pixel_gemm_weights_size(view);
    case ConvAlgorithm::kGroupWinograd:
      return group_winograd_weights_size(view);
    case ConvAlgorithm::kGroupPlanes:
      return group_planes_weights_size(view);
    case ConvAlgorithm::kPlanePairs:
      return plane_pairs_weights_size(view);
    case ConvAlgorithm::kGroupTiles:
      return group_weights_size<T>(view);
    case ConvAlgorithm::kBandProduct:
      return band_gemm_weights_size<T>(view);
    default:
      return 0;
  }
}

// One sample of a view.
ConvView sample_of(const ConvView& view, int64_t n) {
  ConvView sample = view;
  sample.N = 1;
  sample.dst_offset += n * view.dst.n;
  return sample;
}

// Those of one dimension. Returns the samples that they leave to another algorithm.
std::vector<int64_t> winograd_along_rows(const ConvView& view, ConvAlgorithm algorithm,
                                         const float* src, const float* w, const void* packed,
                                         const float* bias, const Epilogue<float>& epilogue,
                                         const Parallel& pool) {
  if (algorithm == ConvAlgorithm::kGroupWinograd)
    return group_winograd_gather(view, src, w, static_cast<const float*>(packed), bias, epilogue,
                                 pool);
  if (algorithm == ConvAlgorithm::kGroupPlanes)
    return group_planes_gather(view, src, w, static_cast<const float*>(packed), bias, epilogue,
                               pool);
  if (algorithm == ConvAlgorithm::kDepthwiseWinograd)
    return depthwise_winograd(view, src, w, static_cast<const float*>(packed), bias, epilogue,
                              pool);
  if (algorithm == ConvAlgorithm::kPlanesWinograd)
    return depthwise_planes_winograd(view, src, w, bias, epilogue, pool);
  return winograd_rows(view, src, w, bias, epilogue, pool);
}

}  // namespace

template <typename T>
PackedForm packed_form(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm,
                       bool frozen, const DirectGemmPlan* plan) {
  std::vector<int64_t> cuts;
  if (plan != nullptr) cuts = direct_gemm_cuts(*plan);
  int64_t size =
      cuts.empty() ? packed_size<T>(p, view, algorithm) : direct_gemm_parts_size(view, cuts);
  if (size == 0 && frozen) size = frozen_size<T>(view, algorithm);
  const int64_t taps = p.R * p.S;
  PackedForm form{p, algorithm, size * static_cast<int64_t>(sizeof(Wide<T>)), std::move(cuts)};
  form.problem.N = 0;
  // Which taps reach the image, how far apart they lie and the steps between outputs are all that
  // the form knows of it: a stride above the image's size moves taps (conv_view.cpp).
  if (static_cast<int64_t>(view.taps.size()) == taps && p.stride_h <= p.H && p.stride_w <= p.W) {
    form.problem.H = form.problem.W = 0;
    form.problem.P = view.step_h;
    form.problem.Q = view.step_w;
  }
  return form;
}

template <typename T>
void pack_weights(const ConvProblem& p, const ConvView& view, const PackedForm& form, const T* w,
                  Wide<T>* packed, const Parallel& pool) {
  const ConvAlgorithm algorithm = form.algorithm;
  if constexpr (kInFloat<T>) {
    if (algorithm == ConvAlgorithm::kStridedWinograd)
      strided_winograd_pack_weights(p, WideArray<T>(w, p.K * p.C * p.R * p.S, pool).get(), packed,
                                    pool);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (!form.cuts.empty()) return direct_gemm_pack_parts(view, form.cuts, w, packed, pool);
    if (algorithm == ConvAlgorithm::kGroupWinograd)
      group_winograd_pack_weights(view, w, packed, pool);
    if (algorithm == ConvAlgorithm::kGroupPlanes) group_planes_pack_weights(view, w, packed, pool);
    if (algorithm == ConvAlgorithm::kDepthwiseWinograd)
      depthwise_winograd_pack_weights(view, w, packed);
  }
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (algorithm == ConvAlgorithm::kDepthwiseColumns)
      depthwise_columns_pack_weights(view, w, packed);
  }
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (algorithm == ConvAlgorithm::kPlanePairs) plane_pairs_pack_weights(view, w, packed, pool);
  }
  if (algorithm == ConvAlgorithm::kWinograd) winograd_pack_weights(view, w, packed, pool);
  if (algorithm == ConvAlgorithm::kDirectProduct) direct_gemm_pack_weights(view, w, packed, pool);
  if (algorithm == ConvAlgorithm::kPixelProduct) pixel_gemm_pack_weights(view, w, packed, pool);
  if (algorithm == ConvAlgorithm::kGroupTiles) group_pack_weights(view, w, packed, pool);
  if (algorithm == ConvAlgorithm::kBandProduct) band_gemm_pack_weights(view, w, packed, pool);
}

template <typename T>
PackedBuffer kept_weights(const ConvProblem& p, const ConvView& view, const PackedForm& form,
                          const T* w, const WeightsOwner& owner, const Parallel& pool) {
  if (owner.number == 0 || form.bytes == 0) return nullptr;
  const int64_t bytes = p.K * view.C * p.R * p.S * static_cast<int64_t>(sizeof(T));
  const WeightsSource source =
      owner.frozen ? WeightsSource(w, owner.version) : WeightsSource(w, bytes, owner.version, pool);
  PackedBuffer kept = packed_weights::find(owner.number, form, source);
  if (kept == nullptr) {
    const auto packed =
        std::make_shared<Buffer<Wide<T>>>(form.bytes / static_cast<int64_t>(sizeof(Wide<T>)));
    pack_weights(p, view, form, w, packed->get(), pool);
    kept = PackedBuffer(packed, packed->get());
    packed_weights::keep(owner.number, form, source, kept);
  }
  return kept;
}

template <typename T>
void conv_gather(const ConvView& view, ConvAlgorithm algorithm, const T* src, const T* w,
                 const void* packed, const T* bias, const Epilogue<T>& epilogue,
                 const Parallel& pool, const DirectGemmPlan* plan) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
    case ConvAlgorithm::kWinogradRows:
    case ConvAlgorithm::kGroupWinograd:
    case ConvAlgorithm::kGroupPlanes:
    case ConvAlgorithm::kDepthwiseWinograd:
    case ConvAlgorithm::kPlanesWinograd: {
      // Samples with an infinity, a NaN or an overflow, which Winograd spreads.
      std::vector<int64_t> special;
      if (algorithm == ConvAlgorithm::kWinograd)
        special = winograd_gather(view, src, w, bias, epilogue, pool,
                                  static_cast<const Wide<T>*>(packed));
      else if constexpr (std::is_same_v<T, float>)
        special = winograd_along_rows(view, algorithm, src, w, packed, bias, epilogue, pool);
      for (const int64_t n : special) {
        const ConvView sample = sample_of(view, n);
        conv_gather(sample, gather_algorithm(sample, kDType<T>, false), src + n * view.src.n, w,
                    nullptr, bias, epilogue, pool);
      }
      return;
    }
    case ConvAlgorithm::kDepthwiseChannels:
      return depthwise_channels_gather(view, src, w, bias, epilogue, pool);
    case ConvAlgorithm::kDepthwiseColumns:
      return depthwise_columns_gather(view, src, w, static_cast<const Wide<T>*>(packed), bias,
                                      epilogue, pool);
    case ConvAlgorithm::kDepthwisePlanes:
      return depthwise_planes_gather(view, src, w, bias, epilogue, pool);
    case ConvAlgorithm::kGroupTiles:
      return group_gather(view, src, w, static_cast<const Wide<T>*>(packed), bias, epilogue, pool);
    case ConvAlgorithm::kBandAlongPixels:
      for (const ConvView& piece : column_pieces(view, sizeof(Wide<T>), kLanes<Wide<T>>))
        band_gather(piece, conv_band<T>(piece, algorithm), src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kBandAlongChannels:
      return band_gather(view, conv_band<T>(view, algorithm), src, w, bias, epilogue, pool);
    case ConvAlgorithm::kInnerProduct:
      if constexpr (std::is_floating_point_v<T>) inner_gather(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kSharedTaps:
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, BFloat16>)
        shared_taps(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kTapRuns:
      if constexpr (std::is_same_v<T, float>) tap_runs(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kPlaneTaps:
      if constexpr (std::is_same_v<T, float>) plane_taps(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kSampleProduct:
      return sample_gemm(view, src, w, bias, epilogue, pool);
    case ConvAlgorithm::kDirectProduct:
      return direct_gemm(view, src, w, static_cast<const Wide<T>*>(packed), bias, epilogue, pool,
                         plan);
    case ConvAlgorithm::kPixelProduct:
      return pixel_gemm(view, src, w, static_cast<const Wide<T>*>(packed), bias, epilogue, pool);
    case ConvAlgorithm::kPlanePairs:
      if constexpr (std::is_same_v<T, BFloat16>)
        plane_pairs(view, src, w, static_cast<const float*>(packed), bias, epilogue, pool);
      return;
    case ConvAlgorithm::kBandProduct:
      return band_gemm(view, src, w, static_cast<const Wide<T>*>(packed), bias, epilogue, pool);
    case ConvAlgorithm::kStridedWinograd:
    case ConvAlgorithm::kDepthwisePhases:
    case ConvAlgorithm::kWgradProduct:
    case ConvAlgorithm::kPairWgrad:
      return;  // of a problem, not of a view, and of no gather
  }
}

template <typename T>
void conv_gather_strided(const ConvProblem& p, StridedPass pass, const std::vector<ConvView>& views,
                         const T* src, const T* w, const void* packed, const T* bias,
                         const Epilogue<T>& epilogue, const Parallel& pool) {
  const auto* u = static_cast<const float*>(packed);
  std::vector<int64_t> special;
  if constexpr (std::is_same_v<T, float>) {
    special = strided_winograd(p, pass, src, w, bias, epilogue, pool, u);
  } else if constexpr (kInFloat<T>) {
    const ConvView& view = views[0];
    const int64_t size = view.N * view.dst.n;
    const WideArray<T> wide_src(src, view.N * view.src.n, pool);
    const WideArray<T> wide_w(w, u != nullptr ? 0 : p.K * p.C * p.R * p.S, pool);
    const WideArray<T> wide_bias(bias, p.K, pool);
    // The epilogue comes with the narrow type, so that a residual is read as it is.
    const Buffer<float> y(size);
    const Epilogue<float> sums{y.get(), nullptr, Activation::kNone};
    special =
        strided_winograd(p, pass, wide_src.get(), wide_w.get(), wide_bias.get(), sums, pool, u);
    store_array(epilogue, y.get(), size, pool);
  }
  for (const int64_t n : special)
    for (const ConvView& view : views) {
      const ConvView sample = sample_of(view, n);
      conv_gather(sample, gather_algorithm(sample, kDType<T>, false), src + n * view.src.n, w,
                  nullptr, bias, epilogue, pool);
    }
}

#define TORCHCONV_CONV_GATHER(T)                                                               \
  template PackedForm packed_form<T>(const ConvProblem&, const ConvView&, ConvAlgorithm, bool, \
                                     const DirectGemmPlan*);                                   \
  template void pack_weights(const ConvProblem&, const ConvView&, const PackedForm&, const T*, \
                             Wide<T>*, const Parallel&);                                       \
  template PackedBuffer kept_weights(const ConvProblem&, const ConvView&, const PackedForm&,   \
                                     const T*, const WeightsOwner&, const Parallel&);          \
  template void conv_gather(const ConvView&, ConvAlgorithm, const T*, const T*, const void*,   \
                            const T*, const Epilogue<T>&, const Parallel&, const DirectGemmPlan*);

TORCHCONV_CONV_GATHER(float)
TORCHCONV_CONV_GATHER(double)
TORCHCONV_CONV_GATHER(BFloat16)
TORCHCONV_CONV_GATHER(Float16)
#undef TORCHCONV_CONV_GATHER

template void conv_gather_strided(const ConvProblem&, StridedPass, const std::vector<ConvView>&,
                                  const float*, const float*, const void*, const float*,
                                  const Epilogue<float>&, const Parallel&);
template void conv_gather_strided(const ConvProblem&, StridedPass, const std::vector<ConvView>&,
                                  const BFloat16*, const BFloat16*, const void*, const BFloat16*,
                                  const Epilogue<BFloat16>&, const Parallel&);
template void conv_gather_strided(const ConvProblem&, StridedPass, const std::vector<ConvView>&,
                                  const Float16*, const Float16*, const void*, const Float16*,
                                  const Epilogue<Float16>&, const Parallel&);

}  // namespace torchconv::cpu
