// The register tiles of convolutions along pixels, one for each size.
#include "cpu/microkernels/pixel_gemm.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <typename T, int kRows, int kVectors, bool kPacks>
void multiply(const PixelTile<T>& tile) {
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  [[maybe_unused]] constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  Register sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Register{};

  const T* a = tile.a;
  const T* b = tile.b;
  [[maybe_unused]] T* packed = const_cast<T*>(tile.b);
  [[maybe_unused]] const T* source = tile.source;
  [[maybe_unused]] const int64_t source_step = tile.source_step;
  [[maybe_unused]] const T* const asked = tile.residual != nullptr ? tile.residual : tile.out;
  const char* next = static_cast<const char*>(tile.next);
  const int64_t next_step = tile.next_step;
#pragma GCC unroll 2
  for (int64_t k = 0; k < tile.depth; ++k) {
    Register row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      row[v] = V::load((kPacks ? source : b) + v * kL);
      if constexpr (kPacks) V::store(packed + v * kL, row[v]);
    }
    __builtin_prefetch(next, 0, 2);
    next += next_step;
    // Each line of a tall tile's result as well, or of what it is added to, a row at a time: there
    // is time for them.
    if constexpr (kRows > 8)
      __builtin_prefetch(asked + k % 16 * tile.out_step + k / 16 % 4 * kLine, 1, 3);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Register x = V::broadcast(a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += x * row[v];
    }
    a += kRows;
    if constexpr (kPacks) {
      source += source_step;
      packed += kPanel<T>;
    } else {
      b += kPanel<T>;
    }
  }

  if (tile.sums != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += V::load(tile.sums + m * kPanel<T> + v * kL);
  }
  if (tile.bias != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += V::broadcast(tile.bias[m]);
  }
  const int64_t step = tile.out_step, rest = tile.columns - (kVectors - 1) * kL;
  if (tile.residual != nullptr) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const T* residual = tile.residual + m * step + v * kL;
        sum[m][v] +=
            v + 1 < kVectors || rest == kL ? V::load(residual) : V::load_partial(residual, rest);
      }
  }
  if (tile.clamps) {
    const Register most = V::broadcast(tile.most);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[m][v] = sum[m][v] < Register{} ? Register{} : sum[m][v];
        sum[m][v] = sum[m][v] > most ? most : sum[m][v];
      }
  }
  T* out = tile.out;
  if (rest == kL) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(out + m * step + v * kL, sum[m][v]);
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors - 1; ++v) V::store(out + m * step + v * kL, sum[m][v]);
      V::store_partial(out + m * step + (kVectors - 1) * kL, sum[m][kVectors - 1], rest);
    }
  }
}

template <typename T, int kVectors, bool kPacks, int... kRow>
PixelMicrokernel<T> find(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr PixelMicrokernel<T> kTable[kMaxRows] = {
      multiply<T, kRow + 1, kVectors, kPacks>...};
  return kTable[rows - 1];
}

}  // namespace

template <typename T>
PixelMicrokernel<T> pixel_microkernel(int64_t rows, int64_t vectors) {
  constexpr auto kAll = std::make_integer_sequence<int, kMaxRows>();
  return vectors == 1 ? find<T, 1, false>(rows, kAll) : find<T, 2, false>(rows, kAll);
}
template <typename T>
PixelMicrokernel<T> packing_pixel_microkernel(int64_t rows) {
  return find<T, kMaxVectors, true>(rows, std::make_integer_sequence<int, kMaxRows>());
}

template PixelMicrokernel<float> pixel_microkernel(int64_t, int64_t);
template PixelMicrokernel<double> pixel_microkernel(int64_t, int64_t);
template PixelMicrokernel<float> packing_pixel_microkernel(int64_t);
template PixelMicrokernel<double> packing_pixel_microkernel(int64_t);

}  // namespace torchconv::cpu
