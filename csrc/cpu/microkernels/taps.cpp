// Depthwise register kernels, one per tile size, fully unrolled.
#include "cpu/microkernels/taps.h"

#include <utility>

namespace torchconv::cpu {
namespace {

// Twelve independent sums cover the latency of two multiply-adds a cycle and leave registers free.
constexpr int kMaxTile = 12;
constexpr int kMaxTaps = 9;

template <typename T, int kTile>
void sum_tile(const TapSum<T>& s, int64_t first) {
  using V = Vec<Wide<T>>;
  const int64_t step = s.src_step, step3 = 3 * step;
  const int64_t lanes = s.vectors * V::kLanes;
  for (int64_t lane = 0; lane < lanes; lane += V::kLanes) {
    typename V::Type sum[kTile];
    const auto start = s.start != nullptr ? V::load(s.start + lane) : typename V::Type{};
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) sum[j] = start;
    const T* src = s.src + first * step + lane;
    const Wide<T>* weights = s.weights + lane;
    for (int64_t t = 0; t < s.taps; ++t) {
      const typename V::Type w = V::load(weights);
      weights += s.weight_step;
      const T* p = src + s.offsets[t];
#pragma GCC unroll 16
      for (int j = 0; j < kTile; j += 3, p += step3) {
        sum[j] += w * WideVec<T>::load(p);
        if (j + 1 < kTile) sum[j + 1] += w * WideVec<T>::load(p + step);
        if (j + 2 < kTile) sum[j + 2] += w * WideVec<T>::load(p + 2 * step);
      }
    }
    Wide<T>* out = s.out + first * s.out_step + lane;
    if (s.start == nullptr) {
#pragma GCC unroll 16
      for (int j = 0; j < kTile; ++j) sum[j] += V::load(out + j * s.out_step);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kTile; ++j) V::store(out + j * s.out_step, sum[j]);
  }
}

template <typename T, int... kIndex>
void sum_tiles(const TapSum<T>& s, std::integer_sequence<int, kIndex...>) {
  using Kernel = void (*)(const TapSum<T>&, int64_t);
  static constexpr Kernel kTable[kMaxTile] = {sum_tile<T, kIndex + 1>...};
  if (0 < s.count && s.count <= kMaxTile) return kTable[s.count - 1](s, 0);
  const int64_t tiles = (s.count + kMaxTile - 1) / kMaxTile;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t n = s.count / tiles + (tile < s.count % tiles ? 1 : 0);
    kTable[n - 1](s, first);
    first += n;
  }
}

template <typename T, int kTaps>
void dot_taps(const TapDot<T>& d, int64_t first) {
  using V = Vec<Wide<T>>;
  const int64_t lanes = d.vectors * V::kLanes;
  for (int64_t lane = 0; lane < lanes; lane += V::kLanes) {
    typename V::Type sum[kTaps];
    const T* src[kTaps];
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) {
      sum[t] = typename V::Type{};
      src[t] = d.src + d.offsets[first + t] + lane;
    }
    const T* dz = d.dz + lane;
    const int64_t end = d.count * d.src_step;
    for (int64_t at = 0; at < end; at += d.src_step, dz += d.dz_step) {
      const typename V::Type gradient = WideVec<T>::load(dz);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t) sum[t] += gradient * WideVec<T>::load(src[t] + at);
    }
    Wide<T>* sums = d.sums + first * d.sum_step + lane;
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t)
      V::store(sums + t * d.sum_step, V::load(sums + t * d.sum_step) + sum[t]);
  }
}

template <typename T, int... kIndex>
void dot_groups(const TapDot<T>& d, std::integer_sequence<int, kIndex...>) {
  using Kernel = void (*)(const TapDot<T>&, int64_t);
  static constexpr Kernel kTable[kMaxTaps] = {dot_taps<T, kIndex + 1>...};
  if (0 < d.taps && d.taps <= kMaxTaps) return kTable[d.taps - 1](d, 0);
  const int64_t groups = (d.taps + kMaxTaps - 1) / kMaxTaps;
  int64_t first = 0;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t n = d.taps / groups + (group < d.taps % groups ? 1 : 0);
    kTable[n - 1](d, first);
    first += n;
  }
}

}  // namespace

template <typename T>
void tap_sum(const TapSum<T>& sum) {
  sum_tiles(sum, std::make_integer_sequence<int, kMaxTile>());
}
template <typename T>
void tap_dot(const TapDot<T>& dot) {
  dot_groups(dot, std::make_integer_sequence<int, kMaxTaps>());
}

#define TORCHCONV_TAPS(T)                  \
  template void tap_sum(const TapSum<T>&); \
  template void tap_dot(const TapDot<T>&);
TORCHCONV_TAPS(float)
TORCHCONV_TAPS(double)
TORCHCONV_TAPS(BFloat16)
TORCHCONV_TAPS(Float16)
#undef TORCHCONV_TAPS

}  // namespace torchconv::cpu
