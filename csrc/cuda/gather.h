// Convolution by small square kernels as one gather, for grouped and depthwise layers: what fprop
// and dgrad of stride 1 and 2 have in common.
//
// A thread computes a tile of outputs from a window of inputs that it loads once. Along one axis,
// output a of a tile and input j of its window meet in tap Taps::tap(a, j), known when compiling,
// so that tile and window stay in registers. Three samplings:
//   kUnit     stride 1 (fprop; dgrad with the kernel turned round)
//   kDilated  the same with outputs of a tile and inputs of a window a dilation apart
//   kStride2  fprop of stride 2
//   kSpread2  dgrad of stride 2: out + pad = 2 * in + tap, so an output meets every other tap;
//             tiles start at even outputs, and the padding's parity is that of "same", (R-1)/2.
#pragma once

#include <type_traits>
#include <utility>

#include "core/conv_problem.h"
#include "core/range.h"
#include "cuda/conv_passes.h"
#include "cuda/divmod.h"

namespace torchconv::cuda {

enum class Sampling : uint8_t { kNone, kUnit, kDilated, kStride2, kSpread2 };

template <int R_, Sampling kSampling_>
struct Taps {
  static constexpr int R = R_;
  static constexpr Sampling kSampling = kSampling_;
  static constexpr bool kDilated = kSampling == Sampling::kDilated;
  static constexpr bool kSpread = kSampling == Sampling::kSpread2;
  static constexpr int kStride = kSampling == Sampling::kStride2 ? 2 : 1;
  static constexpr int kOdd = (R - 1) / 2 % 2;
  // The spread window's first input, relative to the one that the tile's first output points at.
  static constexpr int kFirst = kSpread ? -((R - 1 - kOdd) / 2) : 0;

  static constexpr int window(int tile) {
    return kSpread ? (tile - 1 + kOdd) / 2 - kFirst + 1 : (tile - 1) * kStride + R;
  }
  __host__ __device__ static constexpr int tap(int a, int j) {
    return kSpread ? a + kOdd - 2 * (j + kFirst) : j - a * kStride;
  }
  // Otherwise output a has no tap on input j.
  __host__ __device__ static constexpr bool meet(int a, int j) {
    return tap(a, j) >= 0 && tap(a, j) < R;
  }
};

struct GatherAxis {
  int in, out;
  int origin;    // of the window of output 0
  Divisor unit;  // the dilation, by which a tile's outputs and a window's inputs are apart

  // First output of tile t, and first input of the window of a tile that begins at output `first`.
  template <typename Tap, int kTile>
  __host__ __device__ __forceinline__ int first_output(uint32_t t) const {
    if (!Tap::kDilated) return static_cast<int>(t * kTile);
    const uint32_t phase = unit.split(t);
    return static_cast<int>(t * (kTile * unit.value()) + phase);
  }
  template <typename Tap>
  __host__ __device__ __forceinline__ int first_input(int first) const {
    return (Tap::kSpread ? first / 2 : first * Tap::kStride) + origin;
  }
  template <typename Tap>
  __host__ __device__ __forceinline__ int distance() const {
    return Tap::kDilated ? static_cast<int>(unit.value()) : 1;
  }

  // Tiles of `tile` outputs. unit > 1: tiles interleave, and none begins past the end.
  int tiles_of(int tile) const {
    const int64_t step = static_cast<int64_t>(unit.value()) * tile;
    const int64_t rounds = ceil_div(out, step), rest = out - (rounds - 1) * step;
    const int64_t last = rest < unit.value() ? rest : unit.value();
    return static_cast<int>((rounds - 1) * unit.value() + last);
  }
};

struct Gather {
  GatherAxis h, w;
  int64_t N;
  int groups, in_channels, out_channels;  // channels of one group
  int64_t w_group, w_out, w_in, w_tap;    // distances in the weights
  bool turned;                            // taps in the weights run the other way
};

inline bool is_float(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat64 || t == DType::kBFloat16 ||
         t == DType::kFloat16;
}

// How a pass samples, kNone where gathers cannot compute it.
inline Sampling sampling_of(const ConvProblem& p, Pass pass) {
  if (p.R != p.S || (p.R != 3 && p.R != 5 && p.R != 7)) return Sampling::kNone;
  if (p.dtype == DType::kFloat64 && p.R != 3) return Sampling::kNone;
  const bool dilated = p.dilation_h != 1 || p.dilation_w != 1;
  if (dilated && (p.R != 3 || p.dilation_h > 32 || p.dilation_w > 32)) return Sampling::kNone;
  if (p.stride_h == 1 && p.stride_w == 1) return dilated ? Sampling::kDilated : Sampling::kUnit;
  if (p.stride_h != 2 || p.stride_w != 2 || dilated || p.R == 7) return Sampling::kNone;
  if (pass != Pass::kDgrad) return Sampling::kStride2;
  const bool odd = (p.R - 1) / 2 % 2 != 0;
  return (p.pad_top % 2 != 0) == odd && (p.pad_left % 2 != 0) == odd ? Sampling::kSpread2
                                                                     : Sampling::kNone;
}

// Whether positions of an image, with all that a padding or a dilated kernel adds, and images of
// the batch can be counted in 32 bits. Channels come on top.
inline bool positions_fit(const ConvProblem& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const auto fits = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation,
                       int64_t pad) {
    const auto small = [](int64_t v) { return v < kLimit && v > -kLimit; };
    return small(in) && small(out) && small(kernel) && small(stride) && small(dilation) &&
           small(pad) && small((out + 16) * stride) && small((kernel + 16) * dilation) &&
           (out + 16) * stride + (kernel + 16) * dilation + in < kLimit;
  };
  return fits(p.H, p.P, p.R, p.stride_h, p.dilation_h, p.pad_top) &&
         fits(p.W, p.Q, p.S, p.stride_w, p.dilation_w, p.pad_left) && p.N < kLimit &&
         p.H * p.W < kLimit && p.P * p.Q < kLimit && p.N * p.H * p.W < kLimit &&
         p.N * p.P * p.Q < kLimit && p.K < kLimit && p.C < kLimit && p.N * p.K < kLimit &&
         p.N * p.C < kLimit;
}

// fprop's or dgrad's gather; sampling_of is not kNone, and positions_fit.
inline Gather gather_of(const ConvProblem& p, Pass pass) {
  const bool spread = sampling_of(p, pass) == Sampling::kSpread2, dgrad = pass == Pass::kDgrad;
  const auto axis = [&](int64_t in, int64_t out, int64_t stride, int64_t dilation, int64_t pad) {
    GatherAxis a{};
    a.in = static_cast<int>(dgrad ? out : in);
    a.out = static_cast<int>(dgrad ? in : out);
    a.unit = Divisor(stride == 1 ? dilation : 1);
    const int64_t odd = (p.R - 1) / 2 % 2;
    a.origin = static_cast<int>(spread  ? (pad - odd) / 2 - (p.R - 1 - odd) / 2
                                : dgrad ? pad - (p.R - 1) * dilation
                                        : -pad);
    return a;
  };
  Gather g{};
  g.h = axis(p.H, p.P, p.stride_h, p.dilation_h, p.pad_top);
  g.w = axis(p.W, p.Q, p.stride_w, p.dilation_w, p.pad_left);
  g.N = p.N;
  g.groups = static_cast<int>(p.groups);
  const int64_t channels = p.C / p.groups, filters = p.K / p.groups, taps = p.R * p.S;
  g.in_channels = static_cast<int>(dgrad ? filters : channels);
  g.out_channels = static_cast<int>(dgrad ? channels : filters);
  const bool last = p.weight_layout == Layout::kNHWC;  // channels in the weights
  g.w_group = filters * channels * taps;
  g.w_out = channels * taps;
  g.w_in = last ? 1 : taps;
  g.w_tap = last ? channels : 1;
  if (dgrad) std::swap(g.w_out, g.w_in);
  // dgrad of stride 1 reads the kernel backwards; the spread does so by its taps.
  g.turned = p.flip != (dgrad && !spread);
  return g;
}

// f(Taps<R, sampling>{}), for the instances that sampling_of says there are: R up to 7, or for
// float64 3 alone. kSpread: dgrad's too.
template <typename T, bool kSpread, typename F>
void with_taps(int64_t R, Sampling sampling, F&& f) {
  const auto with = [&](auto r) {
    constexpr int kR = decltype(r)::value;
    if (sampling == Sampling::kUnit) return f(Taps<kR, Sampling::kUnit>{});
    if constexpr (kR == 3)
      if (sampling == Sampling::kDilated) return f(Taps<kR, Sampling::kDilated>{});
    if constexpr (kR < 7) {
      if (sampling == Sampling::kStride2) return f(Taps<kR, Sampling::kStride2>{});
      if constexpr (kSpread) return f(Taps<kR, Sampling::kSpread2>{});
    }
  };
  if constexpr (sizeof(T) < 8) {
    if (R == 7) return with(std::integral_constant<int, 7>{});
    if (R == 5) return with(std::integral_constant<int, 5>{});
  }
  with(std::integral_constant<int, 3>{});
}

}  // namespace torchconv::cuda
