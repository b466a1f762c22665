// The convolution's entry points: they turn a problem into tap lists and run the algorithm that
// conv_choice.h names for each pass, and another one where that meets infinity or NaN.
#include "cpu/conv2d.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "core/buffer.h"
#include "cpu/activation.h"
#include "cpu/conv_band_gather.h"
#include "cpu/conv_band_wgrad.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_integer.h"
#include "cpu/conv_view.h"
#include "cpu/conv_wgrad.h"
#include "cpu/depthwise_channels.h"
#include "cpu/implicit_gemm.h"
#include "cpu/winograd.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

template <typename T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, double>   ? DType::kFloat64
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;

template <typename T>
ConvBand conv_band(const ConvView& view, ConvAlgorithm algorithm) {
  return ConvBand(view, algorithm == ConvAlgorithm::kBandAlongPixels, sizeof(Wide<T>),
                  kLanes<Wide<T>>);
}

template <typename T>
void gather(const ConvView& view, bool winograd, const T* src, const T* w, const T* bias,
            const Epilogue<T>& epilogue, const Parallel& pool) {
  if (view.N == 0 || view.K == 0 || view.pixels() == 0) return;
  const ConvAlgorithm algorithm = gather_algorithm(view, kDType<T>, winograd);
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
      if constexpr (std::is_same_v<T, float>) {
        // Samples with an infinity, a NaN or an overflow, which Winograd spreads.
        for (const int64_t n : winograd_gather(view, src, w, bias, epilogue, pool)) {
          ConvView sample = view;
          sample.N = 1;
          sample.dst_offset += n * view.dst.n;
          gather(sample, false, src + n * view.src.n, w, bias, epilogue, pool);
        }
      }
      return;
    case ConvAlgorithm::kDepthwiseChannels:
      if constexpr (std::is_floating_point_v<T>)
        depthwise_channels_gather(view, src, w, bias, epilogue, pool);
      return;
    case ConvAlgorithm::kBandAlongPixels:
    case ConvAlgorithm::kBandAlongChannels:
      return band_gather(view, conv_band<T>(view, algorithm), src, w, bias, epilogue, pool);
    case ConvAlgorithm::kPackedProduct:
      return implicit_gemm(view, src, w, bias, epilogue, pool);
  }
}

template <typename T>
bool all_finite(const ConvView& view, const T* dw) {
  const int64_t count = view.groups * view.K * view.C;
  for (const ConvTap& tap : view.taps)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t k = i / view.C, c = i % view.C;
      const T* w = dw + k / view.K * view.weight_group + k % view.K * view.weight_k;
      if (!std::isfinite(to_wide(w[c * view.weight_c + tap.weight]))) return false;
    }
  return true;
}

template <typename T>
void wgrad(const ConvView& view, const T* dz, const T* x, T* dw, const Parallel& pool) {
  if (view.N == 0 || view.K == 0 || view.pixels() == 0 || view.terms() == 0) return;
  ConvAlgorithm algorithm = wgrad_algorithm(view, kDType<T>, winograd_allowed());
  if constexpr (std::is_same_v<T, float>) {
    if (algorithm == ConvAlgorithm::kWinograd) {
      if (winograd_wgrad(view, dz, x, dw, pool)) return;
      algorithm = wgrad_algorithm(view, kDType<T>, false);
    }
  }
  switch (algorithm) {
    case ConvAlgorithm::kDepthwiseChannels:
      if constexpr (std::is_floating_point_v<T>) depthwise_channels_wgrad(view, dz, x, dw, pool);
      return;
    case ConvAlgorithm::kBandAlongPixels:
    case ConvAlgorithm::kBandAlongChannels:
      band_wgrad(view, conv_band<T>(view, algorithm), dz, x, dw, pool);
      // The band multiplies pixels that no window holds by zero, which infinity and NaN survive;
      // packing leaves such pixels out.
      if (all_finite(view, dw)) return;
      [[fallthrough]];
    default:
      return conv_wgrad(view, dz, x, dw, pool);
  }
}

template <typename T>
void fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
           void* preactivation, const Parallel& pool) {
  const Epilogue<T> epilogue{static_cast<T*>(y), static_cast<T*>(preactivation), p.activation};
  gather(fprop_view(p), winograd_allowed(), static_cast<const T*>(x), static_cast<const T*>(w),
         static_cast<const T*>(bias), epilogue, pool);
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

  if (dx != nullptr && p.N > 0 && p.C > 0) {
    bool covers_all = false;
    const std::vector<ConvView> views = dgrad_views(p, &covers_all);
    if (!covers_all) std::memset(dx, 0, static_cast<size_t>(p.N * p.C * p.H * p.W) * sizeof(T));
    const Epilogue<T> epilogue{dx, nullptr, Activation::kNone};
    const bool winograd = winograd_allowed();
    for (const ConvView& view : views) gather<T>(view, winograd, dz, w, nullptr, epilogue, pool);
  }
  if (dw != nullptr) {
    const ConvView view = fprop_view(p);
    const bool covers_all =
        static_cast<int64_t>(view.taps.size()) == p.R * p.S && p.N * p.P * p.Q > 0;
    if (!covers_all)
      std::memset(dw, 0, static_cast<size_t>(p.K * (p.C / p.groups) * p.R * p.S) * sizeof(T));
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

void conv2d_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias, void* y,
                  void* preactivation, const Parallel& pool) {
  switch (p.dtype) {
    case DType::kFloat32:
      return fprop<float>(p, x, w, bias, y, preactivation, pool);
    case DType::kFloat64:
      return fprop<double>(p, x, w, bias, y, preactivation, pool);
    case DType::kBFloat16:
      return fprop<BFloat16>(p, x, w, bias, y, preactivation, pool);
    case DType::kFloat16:
      return fprop<Float16>(p, x, w, bias, y, preactivation, pool);
    default:
      return conv_integer(fprop_view(p), p.dtype, x, w, bias, y, pool);
  }
}

void conv2d_backward(const ConvProblem& p, const void* dy, const void* saved, const void* x,
                     const void* w, void* dx, void* dw, void* db, const Parallel& pool) {
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
