// The register tiles of convolutions over a band, one for each size.
#include "cpu/microkernels/band_gemm.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <typename T, int kRows, int kVectors>
void multiply(const BandTile<T>& tile) {
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  Register sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Register{};

  const T* band = tile.band;
  const T* w = tile.w;
  const char* next = static_cast<const char*>(tile.next);
  const int64_t* offsets = tile.offsets;
#pragma GCC unroll 4
  for (int64_t k = 0; k < tile.depth; ++k) {
    const T* pixels = band + offsets[k];
    Register filters[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) filters[v] = V::load(w + v * kL);
    __builtin_prefetch(next, 0, 2);
    next += 64;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Register x = V::broadcast(pixels[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += x * filters[v];
    }
    w += kVectors * kL;
  }

  T* sums = tile.sums;
  if (tile.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += V::load(sums + m * kPanel<T> + v * kL);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) V::store(sums + m * kPanel<T> + v * kL, sum[m][v]);
}

template <typename T, int kVectors, int... kRow>
BandMicrokernel<T> find(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr BandMicrokernel<T> kTable[kMaxRows] = {multiply<T, kRow + 1, kVectors>...};
  return kTable[rows - 1];
}

}  // namespace

template <typename T>
BandMicrokernel<T> band_microkernel(int64_t rows, int64_t vectors) {
  constexpr auto kAll = std::make_integer_sequence<int, kMaxRows>();
  return vectors == 1 ? find<T, 1>(rows, kAll) : find<T, 2>(rows, kAll);
}

template BandMicrokernel<float> band_microkernel(int64_t, int64_t);
template BandMicrokernel<double> band_microkernel(int64_t, int64_t);

}  // namespace torchconv::cpu
