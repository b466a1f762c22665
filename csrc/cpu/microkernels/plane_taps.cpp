// The tiles of plane_taps.h, one for each size.
#include "cpu/microkernels/plane_taps.h"

#include <utility>

#include "cpu/microkernels/clamp_sums.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;

template <int kFilters, int kVectors, bool kEdge>
void plane_taps_tile(const PlaneTile& tile) {
  Register sum[kFilters][kVectors];
#pragma GCC unroll 8
  for (int f = 0; f < kFilters; ++f) {
    Register start{};
    if (tile.bias != nullptr) start = V::broadcast(tile.bias[f]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[f][v] = start;
  }
  const float *src = tile.src, *w = tile.w;
  const int64_t taps = tile.taps, channel_step = tile.channel_step, channel_w = tile.channel_w;
  const int64_t* const offsets = tile.offsets;
  const int64_t ahead = tile.ahead;
  for (int64_t c = tile.channels; c > 0; --c, src += channel_step, w += channel_w) {
    if (ahead != 0) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(src + ahead + v * kL, 0, 3);
    }
    const float* filters = w;
    for (int64_t t = 0; t < taps; ++t, filters += kFilters) {
      const float* const pixels = src + offsets[t];
      const auto pixel = [&](int v) {
        if constexpr (kEdge) return tile.inside[t * kVectors + v].load(pixels + v * kL);
        return V::load(pixels + v * kL);
      };
      // The fewer of the two wait in registers.
      if constexpr (kFilters < kVectors) {
        Register filter[kFilters];
#pragma GCC unroll 8
        for (int f = 0; f < kFilters; ++f) filter[f] = V::broadcast(filters[f]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          Register x = pixel(v);
          keep_in_register(x);
#pragma GCC unroll 8
          for (int f = 0; f < kFilters; ++f) sum[f][v] += x * filter[f];
        }
      } else {
        Register x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = pixel(v);
#pragma GCC unroll 8
        for (int f = 0; f < kFilters; ++f) {
          const Register filter = V::broadcast(filters[f]);
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) sum[f][v] += x[v] * filter;
        }
      }
    }
  }
  if (const float* before = tile.before; before != nullptr) {
#pragma GCC unroll 8
    for (int f = 0; f < kFilters; ++f, before += tile.before_step)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kEdge)
          sum[f][v] += tile.lanes[v].load(before + v * kL);
        else
          sum[f][v] += V::load(before + v * kL);
      }
  }
  if (tile.clamp) clamp_sums(sum, Register{}, V::broadcast(tile.most));
  float* out = tile.out;
#pragma GCC unroll 8
  for (int f = 0; f < kFilters; ++f, out += tile.out_step)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      if constexpr (kEdge)
        tile.lanes[v].store(out + v * kL, sum[f][v]);
      else
        WideVec<float>::store(out + v * kL, sum[f][v], tile.stream);
    }
}

// [vectors - 1]
template <int kFilters, bool kEdge, int... kVector>
PlaneTapsKernel find_vectors(int64_t vectors, std::integer_sequence<int, kVector...>) {
  static constexpr PlaneTapsKernel kTable[] = {plane_taps_tile<kFilters, kVector + 1, kEdge>...};
  return kTable[vectors - 1];
}

template <bool kEdge, int... kFilter>
PlaneTapsKernel find_filters(int64_t filters, int64_t vectors,
                             std::integer_sequence<int, kFilter...>) {
  using Find = PlaneTapsKernel (*)(int64_t);
  static constexpr Find kTable[] = {[](int64_t n) {
    constexpr auto kSizes = std::make_integer_sequence<int, plane_vectors(kFilter + 1)>();
    return find_vectors<kFilter + 1, kEdge>(n, kSizes);
  }...};
  return kTable[filters - 1](vectors);
}

}  // namespace

PlaneTapsKernel plane_taps_kernel(int64_t filters, int64_t vectors, bool at_edge) {
  constexpr auto kSizes = std::make_integer_sequence<int, kPlaneFilters>();
  return at_edge ? find_filters<true>(filters, vectors, kSizes)
                 : find_filters<false>(filters, vectors, kSizes);
}

}  // namespace torchconv::cpu
