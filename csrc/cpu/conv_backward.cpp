// dgrad and wgrad: which way a problem goes, by conv_ways.h, and another one where that meets
// infinity or NaN.
#include <optional>
#include <type_traits>
#include <vector>

#include "core/buffer.h"
#include "cpu/activation.h"
#include "cpu/channels_last_copy.h"
#include "cpu/col2im.h"
#include "cpu/column_pairs.h"
#include "cpu/conv2d.h"
#include "cpu/conv_band_wgrad.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_gather.h"
#include "cpu/conv_pack.h"
#include "cpu/conv_patches.h"
#include "cpu/conv_view.h"
#include "cpu/conv_ways.h"
#include "cpu/conv_wgrad.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_phases.h"
#include "cpu/depthwise_planes.h"
#include "cpu/group_gather.h"
#include "cpu/group_wgrad.h"
#include "cpu/group_winograd.h"
#include "cpu/pair_wgrad.h"
#include "cpu/parallel_range.h"
#include "cpu/phase_image.h"
#include "cpu/sample_patches.h"
#include "cpu/samples_apart.h"
#include "cpu/wide_array.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

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
      return depthwise_channels_wgrad(view, dz, x, dw, pool);
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

// dx in NCHW, of so many channels, from the columns of a channels_last problem: a thread turns what
// it has folded.
template <typename T>
void fold_and_turn(const ConvProblem& p, const std::vector<ConvView>& views, bool covers_all,
                   int64_t channels, const T* columns, T* dx, const Parallel& pool) {
  const int64_t size = p.C * p.H * p.W, depth = p.C * p.R * p.S * p.P * p.Q;
  ConvProblem sample = p;
  sample.N = 1;
  parallel_for_with_scratch(
      pool, 0, p.N, work_grain(static_cast<double>(size + depth)), [&](int64_t begin, int64_t end) {
        const Buffer<T> image(size);
        if (!covers_all) fill_zero(image.get(), size);
        for (int64_t n = begin; n < end; ++n) {
          col2im(sample, views, columns + n * depth, image.get(), kAlone);
          transpose_images(image.get(), 1, size / channels, channels, dx + n * size, kAlone);
        }
      });
}

// The dgrad of contiguous images by way of channels_last ones.
template <typename T>
void dgrad_channels_last(const ConvProblem& p, const T* dz, const T* w, T* dx,
                         const Parallel& pool) {
  const int64_t pixels = p.H * p.W;
  const Buffer<T> last_dz = channels_last_copy(dz, p.N, p.K, p.P * p.Q, pool);
  const Buffer<T> last_w = channels_last_copy(w, p.K, p.C, p.R * p.S, pool);
  const ConvProblem q = merged(channels_last_problem(p));
  bool covers_all = false;
  const std::vector<ConvView> views = dgrad_views(q, &covers_all);
  if (is_even_for_threads(p.N) && dgrad_by_columns(q, views, winograd_allowed()))
    return dgrad_patches(q, last_dz.get(), last_w.get(), dx, pool,
                         [&](const ConvProblem& part, const T* columns, T* to) {
                           fold_and_turn(part, views, covers_all, p.C, columns, to, pool);
                         });
  const Buffer<T> last_dx(p.N * p.C * pixels);
  dgrad<T>(q, last_dz.get(), last_w.get(), last_dx.get(), pool);
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
      return conv_gather_strided<T>(p, StridedPass::kDgrad, views, dz, w, nullptr, nullptr,
                                    epilogue, pool);
  }
  if (covers_all && p.N > 0 && strides_by_groups(p, views))
    return group_dgrad(p, views, dz, w, dx, pool);
  const auto gather_phase = [&](const ConvView& view, const T* weights, const Epilogue<T>& to) {
    if (!is_empty(view))
      conv_gather<T>(view, gather_algorithm(view, kDType<T>, winograd), dz, weights, nullptr,
                     nullptr, to, pool);
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
  if (dgrad_by_columns(p, views, winograd)) {
    if constexpr (std::is_same_v<T, Wide<T>>)
      return dgrad_patches(p, dz, w, dx, pool, [&](const ConvProblem& part, T* columns, T* to) {
        col2im(part, views, columns, to, pool);
      });
    else if constexpr (std::is_same_v<T, BFloat16>)
      return dgrad_column_pairs(p, dz, w, dx, pool);
  }
  for (const ConvView& view : views) gather_phase(view, w, epilogue);
}

template <typename T>
void backward(ConvProblem p, const T* dy, const T* saved, const T* x, const T* w, T* dx, T* dw,
              T* db, const Parallel& pool) {
  const bool active = p.activation != Activation::kNone;
  const bool need_dz = active && (dx != nullptr || dw != nullptr);
  Buffer<T> derivative(need_dz ? p.N * p.K * p.P * p.Q : 0);
  if (need_dz || db != nullptr)
    activation_backward(p, dy, saved, need_dz ? derivative.get() : nullptr, db, pool);
  const T* dz = need_dz ? derivative.get() : dy;
  p.pixel_channels = 0;

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
    if constexpr (std::is_same_v<T, Wide<T>>) {
      if (!is_empty(view) && wgrad_by_samples(p, view, winograd_allowed())) {
        const Buffer<T> samples(p.N * p.P * p.Q * p.C * p.R * p.S);
        unfold_samples(p, x, samples.get(), pool);
        const bool turns = p.layout == Layout::kNCHW;
        const Buffer<T> rows =
            turns ? channels_last_copy(dz, p.N, p.K, p.P * p.Q, pool) : Buffer<T>(0);
        return wgrad(fprop_view(sample_problem(p)), turns ? rows.get() : dz, samples.get(), dw,
                     pool);
      }
      if (!is_empty(view) && wgrad_by_channels_last(p, view, winograd_allowed())) {
        const Buffer<T> last_x = channels_last_copy(x, p.N, p.C, p.H * p.W, pool);
        const Buffer<T> last_dz = channels_last_copy(dz, p.N, p.K, p.P * p.Q, pool);
        return wgrad(fprop_view(channels_last_images(p)), last_dz.get(), last_x.get(), dw, pool);
      }
    }
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
