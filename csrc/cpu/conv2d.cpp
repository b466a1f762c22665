// The convolution's entry points: they turn a problem into tap lists and run the algorithm that
// conv_choice.h names for each pass, and another one where that meets infinity or NaN.
#include "cpu/conv2d.h"

#include <algorithm>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/activation.h"
#include "cpu/band_gemm.h"
#include "cpu/channels_last_copy.h"
#include "cpu/col2im.h"
#include "cpu/conv_band_gather.h"
#include "cpu/conv_band_wgrad.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_integer.h"
#include "cpu/conv_view.h"
#include "cpu/conv_wgrad.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_phases.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_winograd.h"
#include "cpu/direct_gemm.h"
#include "cpu/group_gather.h"
#include "cpu/group_wgrad.h"
#include "cpu/group_winograd.h"
#include "cpu/inner_gather.h"
#include "cpu/pair_wgrad.h"
#include "cpu/patches.h"
#include "cpu/phase_image.h"
#include "cpu/pixel_gemm.h"
#include "cpu/plane_pairs.h"
#include "cpu/sample_gemm.h"
#include "cpu/shared_taps.h"
#include "cpu/wide_array.h"
#include "cpu/winograd.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_strided.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

template <typename T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, double>   ? DType::kFloat64
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;

template <typename T>
constexpr bool kInFloat = std::is_same_v<Wide<T>, float>;

template <typename T>
ConvBand conv_band(const ConvView& view, ConvAlgorithm algorithm) {
  const bool along_pixels = algorithm == ConvAlgorithm::kBandAlongPixels;
  return ConvBand(view, along_pixels, sizeof(Wide<T>), kLanes<Wide<T>>, 0,
                  !along_pixels && packs_channels(view, kLanes<Wide<T>>));
}

// What an algorithm packs of the weights that is worth keeping from call to call, in elements.
template <typename T>
int64_t packed_size(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
      return winograd_weights_size<T>(view);
    case ConvAlgorithm::kStridedWinograd:
      return strided_winograd_weights_size(p);
    case ConvAlgorithm::kDirectProduct:
      return direct_gemm_packs_along<T>(view) ? 0 : direct_gemm_weights_size<T>(view);
    case ConvAlgorithm::kPixelProduct:
      return pixel_gemm_packs_along(view) ? 0 : pixel_gemm_weights_size(view);
    case ConvAlgorithm::kGroupWinograd:
      return group_winograd_weights_size(view);
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

template <typename T>
void pack(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm, const T* w,
          Wide<T>* packed, const Parallel& pool) {
  if constexpr (kInFloat<T>) {
    if (algorithm == ConvAlgorithm::kStridedWinograd)
      strided_winograd_pack_weights(p, WideArray<T>(w, p.K * p.C * p.R * p.S, pool).get(), packed,
                                    pool);
  }
  if constexpr (std::is_same_v<T, float>) {
    if (algorithm == ConvAlgorithm::kGroupWinograd)
      group_winograd_pack_weights(view, w, packed, pool);
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

// What an algorithm packs of the weights that is worth keeping.
template <typename T>
PackedForm packed_form(const ConvProblem& p, const ConvView& view, ConvAlgorithm algorithm) {
  const int64_t size = packed_size<T>(p, view, algorithm);
  const int64_t taps = p.R * p.S;
  PackedForm form{p, algorithm, size * static_cast<int64_t>(sizeof(Wide<T>))};
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

// The packed weights that the owner keeps, made where they are not there yet; or null.
template <typename T>
PackedBuffer kept_weights(const ConvProblem& p, const ConvView& view, const PackedForm& form,
                          const T* w, const WeightsOwner& owner, const Parallel& pool) {
  if (owner.number == 0 || form.bytes == 0) return nullptr;
  const int64_t bytes = p.K * view.C * p.R * p.S * static_cast<int64_t>(sizeof(T));
  const WeightsSource source(w, bytes, owner.version, pool);
  PackedBuffer kept = packed_weights::find(owner.number, form, source);
  if (kept == nullptr) {
    const auto packed =
        std::make_shared<Buffer<Wide<T>>>(form.bytes / static_cast<int64_t>(sizeof(Wide<T>)));
    pack(p, view, form.algorithm, w, packed->get(), pool);
    kept = PackedBuffer(packed, packed->get());
    packed_weights::keep(owner.number, form, source, kept);
  }
  return kept;
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
  if (algorithm == ConvAlgorithm::kDepthwiseWinograd)
    return depthwise_winograd(view, src, w, bias, epilogue, pool);
  if (algorithm == ConvAlgorithm::kPlanesWinograd)
    return depthwise_planes_winograd(view, src, w, bias, epilogue, pool);
  return winograd_rows(view, src, w, bias, epilogue, pool);
}

// packed: what `pack` made for this view and algorithm, or null. plan: of kDirectProduct, or null.
template <typename T>
void gather(const ConvView& view, ConvAlgorithm algorithm, const T* src, const T* w,
            const void* packed, const T* bias, const Epilogue<T>& epilogue, const Parallel& pool,
            const DirectGemmPlan* plan = nullptr) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
    case ConvAlgorithm::kWinogradRows:
    case ConvAlgorithm::kGroupWinograd:
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
        gather(sample, gather_algorithm(sample, kDType<T>, false), src + n * view.src.n, w, nullptr,
               bias, epilogue, pool);
      }
      return;
    }
    case ConvAlgorithm::kDepthwiseChannels:
      if constexpr (std::is_floating_point_v<T>)
        depthwise_channels_gather(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kDepthwiseColumns:
      return depthwise_columns_gather(view, src, w, bias, epilogue, pool);
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

// A problem by kStridedWinograd, which knows float only; views: the same pass for other algorithms.
template <typename T>
void strided_gather(const ConvProblem& p, StridedPass pass, const std::vector<ConvView>& views,
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
      gather(sample, gather_algorithm(sample, kDType<T>, false), src + n * view.src.n, w, nullptr,
             bias, epilogue, pool);
    }
}

bool is_empty(const ConvView& view) { return view.N == 0 || view.K == 0 || view.pixels() == 0; }

template <typename T>
bool wgrad_by_winograd(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return winograd_wgrad(view, dz, x, dw, pool);
  } else {
    const WideArray<T> wide_dz(dz, view.N * view.dst.n, pool);
    const WideArray<T> wide_x(x, view.N * view.src.n, pool);
    const int64_t size = view.groups * view.K * view.weight_k;
    const Buffer<float> sums(size);
    if (view.weight_k != view.terms()) fill_zero(sums.get(), size);
    if (!winograd_wgrad(view, wide_dz.get(), wide_x.get(), sums.get(), pool)) return false;
    narrow_array(dw, sums.get(), size, pool);
    return true;
  }
}

template <typename T>
void wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  if (is_empty(view) || view.terms() == 0) return;
  ConvAlgorithm algorithm = wgrad_algorithm(view, kDType<T>, winograd_allowed());
  if (algorithm == ConvAlgorithm::kWinograd) {
    if (wgrad_by_winograd(view, dz, x, dw, pool)) return;
    algorithm = wgrad_algorithm(view, kDType<T>, false);
  }
  switch (algorithm) {
    case ConvAlgorithm::kDepthwiseChannels:
      if constexpr (std::is_floating_point_v<T>) depthwise_channels_wgrad(view, dz, x, dw, pool);
      return;
    case ConvAlgorithm::kBandAlongPixels:
    case ConvAlgorithm::kBandAlongChannels:
      if (band_wgrad(view, algorithm == ConvAlgorithm::kBandAlongPixels, dz, x, dw, pool)) return;
      return conv_wgrad(view, dz, x, dw, pool);  // which multiplies nothing by padding
    case ConvAlgorithm::kDepthwiseColumns:
      if (depthwise_columns_wgrad(view, dz, x, dw, pool)) return;
      return conv_wgrad(view, dz, x, dw, pool);
    case ConvAlgorithm::kDepthwisePlanes:
      if (depthwise_planes_wgrad(view, dz, x, dw, pool)) return;
      return conv_wgrad(view, dz, x, dw, pool);
    case ConvAlgorithm::kGroupWinograd:
      if constexpr (std::is_same_v<T, float>) {
        if (group_winograd_wgrad(view, dz, x, dw, pool)) return;
      }
      return conv_wgrad(view, dz, x, dw, pool);
    case ConvAlgorithm::kGroupTiles:
      if (group_wgrad(view, dz, x, dw, pool)) return;
      return conv_wgrad(view, dz, x, dw, pool);
    case ConvAlgorithm::kPairWgrad:
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (pair_wgrad(view, dz, x, dw, pool)) return;
      }
      [[fallthrough]];
    default:
      return conv_wgrad(view, dz, x, dw, pool);
  }
}

// For a problem that goes_by_patches or dgrad_by_columns, whose patches `view` reads or writes:
// calls f(part, n, patches, gather) for samples n and on, as many as have their patches in a
// last-level cache: of smaller parts the threads would wait for each other too often. part is the
// problem of these samples, and gather(src, epilogue) their matrix product.
template <typename T, typename F>
void for_patches(const ConvProblem& p, ConvView view, const T* w, const T* bias,
                 const WeightsOwner& owner, const Parallel& pool, F&& f) {
  constexpr int64_t kPatchBytes = 8 << 20;
  const ConvProblem q = patch_problem(p);
  const ConvAlgorithm algorithm = gather_algorithm(view, kDType<T>, winograd_allowed());
  const PackedForm form = packed_form<T>(q, view, algorithm);
  const PackedBuffer kept = kept_weights(q, view, form, w, owner, pool);
  const int64_t packs = kept != nullptr ? 0 : form.bytes / static_cast<int64_t>(sizeof(Wide<T>));
  const Buffer<Wide<T>> own(packs);
  if (packs > 0) pack(q, view, algorithm, w, own.get(), pool);
  const void* const packed = packs > 0 ? own.get() : kept.get();
  const int64_t size = q.C * q.H * q.W;
  const int64_t most = kPatchBytes / static_cast<int64_t>(sizeof(T)) / size;
  const int64_t parts = ceil_div(p.N, std::clamp<int64_t>(most, 1, p.N));
  const Buffer<T> patches(ceil_div(p.N, parts) * size);
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t n = i * p.N / parts;
    ConvProblem part = p;
    part.N = view.N = (i + 1) * p.N / parts - n;
    f(part, n, patches.get(), [&](const T* src, const Epilogue<T>& epilogue) {
      gather(view, algorithm, src, w, packed, bias, epilogue, pool);
    });
  }
}

// fprop of a merged problem: which way it goes.
template <typename T>
class Fprop : public ConvPlan {
 public:
  explicit Fprop(const ConvProblem& p);
  // For calls that repeat it. owned: with an owner of the weights.
  void plan_tasks(bool owned);
  // See conv2d_writes_parts.
  bool writes_parts() const {
    return way_ == Way::kGather && (form_.algorithm == ConvAlgorithm::kDirectProduct ||
                                    form_.algorithm == ConvAlgorithm::kWinograd);
  }
  void run(const void* x, const void* w, const WeightsOwner& owner, const void* bias,
           const void* residual, void* y, void* preactivation, const Parallel& pool) const override;

 private:
  enum class Way : uint8_t { kNothing, kPatches, kChannelsLast, kStrided, kGather };

  Way choose();

  const ConvProblem p_;
  const ConvView view_;
  PackedForm form_{};  // and the algorithm of kStrided and kGather
  const Way way_;
  std::shared_ptr<const DirectGemmPlan> direct_;  // or null
};

// The fprop of contiguous images by way of channels_last ones.
template <typename T>
void fprop_channels_last(const ConvProblem& p, const T* x, const T* w, const void* bias,
                         const Epilogue<T>& epilogue, const Parallel& pool) {
  const int64_t pixels = p.P * p.Q, size = p.N * p.K * pixels;
  const Buffer<T> last_x = channels_last_copy(x, p.N, p.C, p.H * p.W, pool);
  const Buffer<T> last_w = channels_last_copy(w, p.K, p.C, p.R * p.S, pool);
  const Buffer<T> last_z(size), z(size);
  ConvProblem q = channels_last_problem(p);
  q.activation = Activation::kNone;
  Fprop<T>(merged(q)).run(last_x.get(), last_w.get(), WeightsOwner{}, bias, nullptr, last_z.get(),
                          nullptr, pool);
  transpose_images(last_z.get(), p.N, pixels, p.K, z.get(), pool);
  store_array(epilogue, z.get(), size, pool);
}

template <typename T>
Fprop<T>::Fprop(const ConvProblem& p) : p_(p), view_(fprop_view(p)), way_(choose()) {}

template <typename T>
typename Fprop<T>::Way Fprop<T>::choose() {
  if (is_empty(view_)) return Way::kNothing;
  const bool winograd = winograd_allowed();
  if constexpr (std::is_floating_point_v<T>) {
    if (goes_by_patches(p_, StridedPass::kFprop)) return Way::kPatches;
    if (fprop_by_channels_last(p_, view_, winograd)) return Way::kChannelsLast;
  }
  const bool strided = strides_by_winograd(p_, StridedPass::kFprop, winograd);
  form_ = packed_form<T>(
      p_, view_,
      strided ? ConvAlgorithm::kStridedWinograd : gather_algorithm(view_, kDType<T>, winograd));
  return strided ? Way::kStrided : Way::kGather;
}

template <typename T>
void Fprop<T>::plan_tasks(bool owned) {
  if constexpr (std::is_same_v<T, float>) {
    if (way_ == Way::kGather && form_.algorithm == ConvAlgorithm::kDirectProduct)
      direct_ = plan_direct_gemm(view_, owned && form_.bytes > 0);
  }
}

template <typename T>
void Fprop<T>::run(const void* x, const void* w, const WeightsOwner& owner, const void* bias,
                   const void* residual, void* y, void* preactivation, const Parallel& pool) const {
  if (way_ == Way::kNothing) return;
  const Epilogue<T> epilogue{static_cast<T*>(y), static_cast<T*>(preactivation), p_.activation,
                             static_cast<const T*>(residual)};
  const T* const src = static_cast<const T*>(x);
  const T* const weights = static_cast<const T*>(w);
  const T* const b = static_cast<const T*>(bias);
  if constexpr (std::is_floating_point_v<T>) {
    if (way_ == Way::kPatches)
      return for_patches<T>(p_, fprop_view(patch_problem(p_)), weights, b, owner, pool,
                            [&](const ConvProblem& part, int64_t n, T* patches, auto&& product) {
                              unfold_patches(part, src + n * p_.C * p_.H * p_.W, patches, pool);
                              product(patches, epilogue.at(n * view_.dst.n));
                            });
    if (way_ == Way::kChannelsLast)
      return fprop_channels_last(p_, src, weights, bias, epilogue, pool);
  }
  const PackedBuffer packed = kept_weights(p_, view_, form_, weights, owner, pool);
  if constexpr (kInFloat<T>) {
    if (way_ == Way::kStrided)
      return strided_gather(p_, StridedPass::kFprop, {view_}, src, weights, packed.get(), b,
                            epilogue, pool);
  }
  gather(view_, form_.algorithm, src, weights, packed.get(), b, epilogue, pool, direct_.get());
}

// dx from patches that the weights make of dz, by fold(part, patches, dx of the part).
template <typename T, typename F>
void dgrad_patches(const ConvProblem& p, const T* dz, const T* w, T* dx, const Parallel& pool,
                   F&& fold) {
  bool all;
  const ConvView view = dgrad_views(patch_problem(p), &all)[0];
  for_patches<T>(p, view, w, nullptr, WeightsOwner{}, pool,
                 [&](const ConvProblem& part, int64_t n, T* patches, auto&& product) {
                   product(dz + n * view.src.n, Epilogue<T>{patches, nullptr, Activation::kNone});
                   fold(part, patches, dx + n * p.C * p.H * p.W);
                 });
}

template <typename T>
void dgrad(const ConvProblem& p, const T* dz, const T* w, T* dx, const Parallel& pool);

// The dgrad of contiguous images by way of channels_last ones.
template <typename T>
void dgrad_channels_last(const ConvProblem& p, const T* dz, const T* w, T* dx,
                         const Parallel& pool) {
  const int64_t pixels = p.H * p.W;
  const Buffer<T> last_dz = channels_last_copy(dz, p.N, p.K, p.P * p.Q, pool);
  const Buffer<T> last_w = channels_last_copy(w, p.K, p.C, p.R * p.S, pool);
  const Buffer<T> last_dx(p.N * p.C * pixels);
  dgrad<T>(merged(channels_last_problem(p)), last_dz.get(), last_w.get(), last_dx.get(), pool);
  transpose_images(last_dx.get(), p.N, pixels, p.C, dx, pool);
}

template <typename T>
void dgrad(const ConvProblem& p, const T* dz, const T* w, T* dx, const Parallel& pool) {
  if constexpr (!std::is_integral_v<T>) {
    if (goes_by_patches(p, StridedPass::kDgrad))
      return dgrad_patches(p, dz, w, dx, pool, [&](const ConvProblem& part, T* patches, T* to) {
        fold_patches(part, patches, to, pool);
      });
  }
  if (const std::optional<ConvAlgorithm> at_once = dgrad_at_once(p)) {
    if (at_once == ConvAlgorithm::kDepthwisePlanes)
      return depthwise_planes_spread(p, dz, w, dx, pool);
    if (at_once == ConvAlgorithm::kDepthwisePhases) return depthwise_phases(p, dz, w, dx, pool);
    return depthwise_columns_spread(p, dz, w, dx, pool);
  }
  bool covers_all = false;
  const std::vector<ConvView> views = dgrad_views(p, &covers_all);
  const Epilogue<T> epilogue{dx, nullptr, Activation::kNone};
  const bool winograd = winograd_allowed();
  if constexpr (kInFloat<T>) {
    if (covers_all && strides_by_winograd(p, StridedPass::kDgrad, winograd))
      return strided_gather<T>(p, StridedPass::kDgrad, views, dz, w, nullptr, nullptr, epilogue,
                               pool);
  }
  if (covers_all && p.N > 0 && strides_by_groups(p, views))
    return group_dgrad(p, views, dz, w, dx, pool);
  const auto gather_phase = [&](const ConvView& view, const T* weights, const Epilogue<T>& to) {
    if (!is_empty(view))
      gather<T>(view, gather_algorithm(view, kDType<T>, winograd), dz, weights, nullptr, nullptr,
                to, pool);
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (strides_by_image(p, views, winograd)) {
      const PhaseImage image(p, covers_all, pool);
      const Epilogue<T> to{image.data(), nullptr, Activation::kNone};
      if (p.groups == 1 && p.weight_layout == Layout::kNCHW) {
        const PhaseWeights taps(p, w, pool);
        for (const ConvView& view : image.phases(views))
          gather_phase(taps.phase(view), taps.data(), to);
      } else {
        for (const ConvView& view : image.phases(views)) gather_phase(view, w, to);
      }
      return image.store(dx, pool);
    }
  }
  if constexpr (std::is_same_v<T, Wide<T>>)
    if (dgrad_by_channels_last(p, views, winograd)) return dgrad_channels_last(p, dz, w, dx, pool);
  if (!covers_all) zero_array(dx, p.N * p.C * p.H * p.W, pool);
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (dgrad_by_columns(p, views, winograd))
      return dgrad_patches(p, dz, w, dx, pool, [&](const ConvProblem& part, T* columns, T* to) {
        col2im(part, views, columns, to, pool);
      });
  }
  for (const ConvView& view : views) gather_phase(view, w, epilogue);
}

template <typename T>
void backward(const ConvProblem& p, const T* dy, const T* saved, const T* x, const T* w, T* dx,
              T* dw, T* db, const Parallel& pool) {
  const bool active = p.activation != Activation::kNone;
  const bool need_dz = active && (dx != nullptr || dw != nullptr);
  Buffer<T> derivative(need_dz ? p.N * p.K * p.P * p.Q : 0);
  if (need_dz || db != nullptr)
    activation_backward(p, dy, saved, need_dz ? derivative.get() : nullptr, db, pool);
  const T* dz = need_dz ? derivative.get() : dy;

  if (dx != nullptr && p.N > 0 && p.C > 0) dgrad(p, dz, w, dx, pool);
  if (dw != nullptr) {
    if constexpr (std::is_floating_point_v<T>) {
      if (wgrad_goes_by_patches(p)) {
        const Buffer<T> patches(p.N * p.C * p.P * p.Q);
        unfold_patches(p, x, patches.get(), pool);
        return wgrad(fprop_view(patch_problem(p)), dz, patches.get(), dw, pool);
      }
    }
    const ConvView view = fprop_view(p);
    const bool covers_all =
        static_cast<int64_t>(view.taps.size()) == p.R * p.S && p.N * p.P * p.Q > 0;
    if (!covers_all) zero_array(dw, p.K * (p.C / p.groups) * p.R * p.S, pool);
    wgrad(view, dz, x, dw, pool);
  }
}

template <typename T>
void backward(const ConvProblem& p, const void* dy, const void* saved, const void* x, const void* w,
              void* dx, void* dw, void* db, const Parallel& pool) {
  backward(p, static_cast<const T*>(dy), static_cast<const T*>(saved), static_cast<const T*>(x),
           static_cast<const T*>(w), static_cast<T*>(dx), static_cast<T*>(dw), static_cast<T*>(db),
           pool);
}

}  // namespace

void conv2d_fprop(const ConvProblem& problem, const void* x, const void* w,
                  const WeightsOwner& owner, const void* bias, const void* residual, void* y,
                  void* preactivation, const Parallel& pool) {
  const ConvProblem p = merged(problem);
  const auto run = [&](const ConvPlan& plan) {
    plan.run(x, w, owner, bias, residual, y, preactivation, pool);
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return run(Fprop<float>(p));
    case DType::kFloat64:
      return run(Fprop<double>(p));
    case DType::kBFloat16:
      return run(Fprop<BFloat16>(p));
    case DType::kFloat16:
      return run(Fprop<Float16>(p));
    default:
      return conv_integer(fprop_view(p), p.dtype, x, w, bias, y, pool);
  }
}

std::shared_ptr<const ConvPlan> plan_conv2d_fprop(const ConvProblem& problem, bool owned) {
  const ConvProblem p = merged(problem);
  const auto plan = [&](auto element) -> std::shared_ptr<const ConvPlan> {
    const auto made = std::make_shared<Fprop<decltype(element)>>(p);
    made->plan_tasks(owned);
    return made;
  };
  switch (p.dtype) {
    case DType::kFloat32:
      return plan(float{});
    case DType::kFloat64:
      return plan(double{});
    case DType::kBFloat16:
      return plan(BFloat16{});
    case DType::kFloat16:
      return plan(Float16{});
    default:
      return nullptr;
  }
}

bool conv2d_writes_parts(const ConvProblem& problem) {
  const ConvProblem p = merged(problem);
  return p.dtype == DType::kFloat32 && p.layout == Layout::kNHWC && p.groups == 1 &&
         Fprop<float>(p).writes_parts();
}

void conv2d_backward(const ConvProblem& problem, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Parallel& pool) {
  const ConvProblem p = merged(problem);
  switch (p.dtype) {
    case DType::kFloat32:
      return backward<float>(p, dy, saved, x, w, dx, dw, db, pool);
    case DType::kFloat64:
      return backward<double>(p, dy, saved, x, w, dx, dw, db, pool);
    case DType::kBFloat16:
      return backward<BFloat16>(p, dy, saved, x, w, dx, dw, db, pool);
    case DType::kFloat16:
      return backward<Float16>(p, dy, saved, x, w, dx, dw, db, pool);
    default:
      return;
  }
}

}  // namespace torchconv::cpu
