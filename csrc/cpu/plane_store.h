// From blocks [pixel][filter] to images where pixels are neighbours in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/activation.h"
#include "cpu/conv_pack.h"
#include "cpu/simd.h"
#include "cpu/transpose_tile.h"

namespace torchconv::cpu {

// Where a block's pixels and filters belong: pixel p of filter k to base + pixels[p] + k*plane.
struct PlaneTarget {
  const int64_t* pixels;
  int64_t count, base, plane;
  int64_t step;  // of neighbouring pixels
  int64_t filters;

  // Calls f(first, n) on runs of at most `most` neighbouring pixels.
  template <typename F>
  void for_runs(int64_t most, F&& f) const {
    for (int64_t p = 0, n; p < count; p += n) {
      for (n = 1; n < most && p + n < count && pixels[p + n] == pixels[p] + n * step;) ++n;
      f(p, n);
    }
  }
};

// Sums that have had their bias, [pixel][ld].
template <typename T>
void store_float_planes(const float* block, int64_t ld, const PlaneTarget& to,
                        const Epilogue<T>& epilogue) {
  constexpr int64_t kL = kLanes<float>, kRun = 4 * kL;
  alignas(64) float planes[kL * kRun];
  to.for_runs(kRun, [&](int64_t p, int64_t n) {
    for (int64_t k = 0; k < to.filters; k += kL) {
      const int64_t filters = std::min(kL, to.filters - k);
      for (int64_t i = 0; i < n; i += kL)
        transpose_tile(block + (p + i) * ld + k, ld, std::min(kL, n - i), kL, planes + i, kRun,
                       filters);
      for (int64_t f = 0; f < filters; ++f)
        epilogue.store(planes + f * kRun, n, to.base + (k + f) * to.plane + to.pixels[p], to.step);
    }
  });
}

// Finished outputs of 16 bits, [pixel][ld] with whole vectors of filters; to.step is 1. Pairs of
// filters are transposed as one element and parted at the end.
template <typename T>
void store_rounded_planes(const T* block, int64_t ld, const PlaneTarget& to, T* dst) {
  static_assert(sizeof(T) == 2, "two elements in one of 32 bits");
  using Words = Vec<uint32_t>;
  using Halves = Vec<uint16_t>;
  constexpr int64_t kL = Words::kLanes;
  constexpr auto kAll = std::make_integer_sequence<int, Halves::kLanes>();
  alignas(64) uint32_t first[kL * kL];
  const auto transposed = [&](const T* from, int64_t n, Words::Type(&tile)[kL]) {
#pragma GCC unroll 16
    for (int l = 0; l < kL; ++l) tile[l] = l < n ? Words::load(from + l * ld) : Words::Type{};
    transpose_steps<1>(tile);
  };
  to.for_runs(2 * kL, [&](int64_t p, int64_t n) {
    for (int64_t k = 0; k < to.filters; k += 2 * kL) {
      Words::Type tile[kL];
      transposed(block + p * ld + k, n, tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) Words::store(first + l * kL, tile[l]);
      if (n > kL) transposed(block + (p + kL) * ld + k, n - kL, tile);
      T* plane = dst + to.base + k * to.plane + to.pixels[p];
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l, plane += 2 * to.plane) {
        const auto low = Halves::load(first + l * kL), high = bit_cast<Halves::Type>(tile[l]);
        const auto even = alternate_lanes<0>(low, high, kAll);
        const auto odd = alternate_lanes<1>(low, high, kAll);
        if (n == 2 * kL && k + 2 * l + 1 < to.filters) {
          Halves::store(plane, even);
          Halves::store(plane + to.plane, odd);
          continue;
        }
        if (k + 2 * l < to.filters) Halves::store_partial(plane, even, n);
        if (k + 2 * l + 1 < to.filters) Halves::store_partial(plane + to.plane, odd, n);
      }
    }
  });
}

}  // namespace torchconv::cpu
