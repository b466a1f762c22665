// The body of the register-tile product, instantiated once for each type in a file of its own.
#pragma once

#include <utility>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

// A term is one channel.
template <typename T>
struct BandProduct {
  using Element = T;
  using Register = typename Vec<T>::Type;
  static TORCHCONV_INLINE void add(Register& sum, Register x, Register row) { sum += x * row; }
  static TORCHCONV_INLINE void add_element(Register& sum, const T* x, Register row) {
    sum += *x * row;
  }
};

template <typename Product, int kRows, int kVectors>
void gemm_tile(const GemmTile<typename Product::Element>& tile) {
  using T = typename Product::Element;
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  Register sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[m][v] = Register{};

  const T* a = tile.a;
  const T* b = tile.b;
#pragma GCC unroll 4
  for (int64_t k = 0; k < tile.depth; ++k) {
    Register row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = V::load(b + tile.offsets[k] + v * kL);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      if constexpr (kVectors == 1) {
        Product::add_element(sum[m][0], a + m * kARow<T>, row[0]);
        continue;
      }
      const Register x = V::broadcast(a[m * kARow<T>]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) Product::add(sum[m][v], x, row[v]);
    }
    ++a;
  }

  T* c = tile.c;
  if (tile.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        V::store(c + m * tile.ldc + v * kL, V::load(c + m * tile.ldc + v * kL) + sum[m][v]);
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(c + m * tile.ldc + v * kL, sum[m][v]);
  }
}

// [vectors - 1][rows - 1]
template <typename Product, int... kRow>
GemmMicrokernel<typename Product::Element> find_gemm_tile(int64_t rows, int64_t vectors,
                                                          std::integer_sequence<int, kRow...>) {
  static constexpr GemmMicrokernel<typename Product::Element> kTable[kMaxVectors][sizeof...(kRow)] =
      {{gemm_tile<Product, kRow + 1, 1>...}, {gemm_tile<Product, kRow + 1, 2>...}};
  return kTable[vectors - 1][rows - 1];
}

}  // namespace torchconv::cpu
