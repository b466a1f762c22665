// The register-tile product of two transposed panels.
#include "cpu/microkernels/outer_product.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <typename T, int kRows, int kVectors>
void outer_product_tile(const OuterProductTile<T>& tile) {
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes, kStride = kPanel<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  Register sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Register{};

  T* c = tile.c;
  if (tile.accumulate)
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
      for (int64_t n = 0; n < kStride; n += kLine) __builtin_prefetch(c + m * kStride + n, 1, 3);

  const T* a = tile.a;
  const T* b = tile.b;
  const T* next = tile.next;
#pragma GCC unroll 4
  for (int64_t t = 0; t < tile.depth; ++t) {
    Register row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = V::load(b + v * kL);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Register x = V::broadcast(a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += x * row[v];
    }
#pragma GCC unroll 2
    for (int64_t n = 0; n < kStride; n += kLine) __builtin_prefetch(next + n, 0, 2);
    a += kStride;
    b += kStride;
    next += kStride;
  }

  if (tile.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        V::store(c + m * kStride + v * kL, V::load(c + m * kStride + v * kL) + sum[m][v]);
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(c + m * kStride + v * kL, sum[m][v]);
  }
}

// [vectors - 1][rows - 1]
template <typename T, int... kRow>
OuterProductMicrokernel<T> find_outer_tile(int64_t rows, int64_t vectors,
                                           std::integer_sequence<int, kRow...>) {
  static constexpr OuterProductMicrokernel<T> kTable[kMaxVectors][kMaxRows] = {
      {outer_product_tile<T, kRow + 1, 1>...}, {outer_product_tile<T, kRow + 1, 2>...}};
  return kTable[vectors - 1][rows - 1];
}

}  // namespace

template <typename T>
OuterProductMicrokernel<T> outer_product_microkernel(int64_t rows, int64_t vectors) {
  return find_outer_tile<T>(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}
template OuterProductMicrokernel<float> outer_product_microkernel(int64_t, int64_t);
template OuterProductMicrokernel<double> outer_product_microkernel(int64_t, int64_t);

}  // namespace torchconv::cpu
