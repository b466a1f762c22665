// The tiles of tap_run.h, one for each size.
#include "cpu/microkernels/tap_run.h"

#include <utility>

#include "cpu/microkernels/clamp_sums.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using Register = V::Type;
constexpr int kL = V::kLanes;

template <int kPixels, int kVectors>
void tap_run(const TapRunTile& tile) {
  // Of five pixels one has a pointer, which the others lie multiples of the step behind.
  constexpr int kApart = 5, kPointers = (kPixels + kApart - 1) / kApart;
  Register sum[kPixels][kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const Register start = V::load(tile.bias + v * kL);
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m) sum[m][v] = start;
  }
  const int64_t c_step = tile.c_step, step = tile.pixel_step;
  const float *src = tile.src, *w = tile.w;
  for (int64_t r = tile.rows; r > 0; --r, src += tile.src_row, w += tile.w_row) {
    const float* pixel[kPointers];
#pragma GCC unroll 4
    for (int p = 0; p < kPointers; ++p) pixel[p] = src + p * kApart * step;
    const float* b = w;
    for (int64_t t = tile.run; t > 0; --t, b += kVectors * kL) {
      Register filters[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) filters[v] = V::load(b + v * kL);
#pragma GCC unroll 16
      for (int m = 0; m < kPixels; ++m) {
        const Register x = V::broadcast(pixel[m / kApart][m % kApart * step]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] += x * filters[v];
      }
#pragma GCC unroll 4
      for (int p = 0; p < kPointers; ++p) ++pixel[p];
    }
  }
  const int64_t lanes = tile.lanes;
  if (const float* before = tile.before; before != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m, before += c_step)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sum[m][v] += v + 1 < kVectors || lanes == kL ? V::load(before + v * kL)
                                                     : V::load_partial(before + v * kL, lanes);
  }
  if (tile.clamp) clamp_sums(sum, Register{}, V::broadcast(tile.most));
  float* c = tile.c;
  if (lanes == kL) {
#pragma GCC unroll 16
    for (int m = 0; m < kPixels; ++m, c += c_step)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) WideVec<float>::store(c + v * kL, sum[m][v], tile.stream);
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kPixels; ++m, c += c_step) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; ++v) V::store(c + v * kL, sum[m][v]);
    V::store_partial(c + (kVectors - 1) * kL, sum[m][kVectors - 1], lanes);
  }
}

// [pixels - 1]
template <int kVectors, int... kPixels>
TapRunMicrokernel find(int64_t pixels, std::integer_sequence<int, kPixels...>) {
  static constexpr TapRunMicrokernel kTable[] = {tap_run<kPixels + 1, kVectors>...};
  return kTable[pixels - 1];
}

}  // namespace

TapRunMicrokernel tap_run_microkernel(int64_t pixels, int64_t vectors) {
  static_assert(kMaxVectors == 2);
  constexpr auto kSizes = std::make_integer_sequence<int, int{kMaxRows}>();
  return vectors == 1 ? find<1>(pixels, kSizes) : find<2>(pixels, kSizes);
}

}  // namespace torchconv::cpu
