// The register tile of a weight gradient, one function per size.
#include "cpu/microkernels/pixel_product.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <typename T, int kRows, int kVectors, bool kNeighbours>
void pixel_product_tile(const PixelProduct<T>& tile) {
  using V = Vec<T>;
  using Register = typename V::Type;
  constexpr int64_t kL = V::kLanes;
  Register sum[kRows][kVectors];
  constexpr int kPointers = kNeighbours ? 1 : kRows;
  const T* rows[kPointers];
#pragma GCC unroll 8
  for (int m = 0; m < kPointers; ++m) rows[m] = tile.rows[m];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = Register{};
      if (tile.accumulate) __builtin_prefetch(tile.sum + m * tile.sum_stride + v * kL, 1, 3);
    }
  }

  // By value: what they point to might be written, for all that the compiler knows.
  const int64_t row_step = tile.row_step, column_step = tile.column_step;
  int64_t apart[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kNeighbours)
      apart[v] = tile.apart[v];
    else
      apart[v] = v * kL;
  }
  const void* const* fetch = tile.fetch;
  const ProductRun* last = tile.runs + tile.run_count;
  for (const ProductRun* run = tile.runs; run < last; ++run) {
    const T* columns = tile.columns + run->column;
    int64_t at = run->row;
    for (int64_t i = run->count; i > 0; --i) {
      Register column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = V::load(columns + apart[v]);
#pragma GCC unroll 16
      for (int m = 0; m < kRows; ++m) {
        const Register x = V::broadcast(kNeighbours ? rows[0][at + m] : rows[m][at]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[m][v] += x * column[v];
      }
      __builtin_prefetch(*fetch++, 0, 2);
      at += row_step;
      columns += column_step;
    }
  }

  T* to = tile.sum;
  if (tile.accumulate) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* at = to + m * tile.sum_stride + v * kL;
        V::store(at, V::load(at) + sum[m][v]);
      }
  } else if (tile.stream) {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) stream_bytes(to + m * tile.sum_stride + v * kL, sum[m][v]);
  } else {
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(to + m * tile.sum_stride + v * kL, sum[m][v]);
  }
}

// [vectors - 1][rows - 1]
template <typename T, int kVectors, bool kNeighbours, int... kRow>
PixelProductKernel<T> find_rows(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr PixelProductKernel<T> kTable[] = {
      pixel_product_tile<T, kRow + 1, kVectors, kNeighbours>...};
  return kTable[rows - 1];
}

template <typename T, bool kNeighbours, int... kVector>
PixelProductKernel<T> find_tile(int64_t rows, int64_t vectors,
                                std::integer_sequence<int, kVector...>) {
  using Find = PixelProductKernel<T> (*)(int64_t);
  static constexpr Find kTable[] = {[](int64_t n) {
    constexpr int kMost = kNeighbours ? neighbour_rows(kVector + 1) : kProductRows;
    return find_rows<T, kVector + 1, kNeighbours>(n, std::make_integer_sequence<int, kMost>());
  }...};
  return kTable[vectors - 1](rows);
}

}  // namespace

template <typename T>
PixelProductKernel<T> pixel_product_kernel(int64_t rows, int64_t vectors) {
  return find_tile<T, false>(rows, vectors, std::make_integer_sequence<int, kProductVectors>());
}

template <typename T>
PixelProductKernel<T> pixel_product_neighbours_kernel(int64_t rows, int64_t vectors) {
  return find_tile<T, true>(rows, vectors, std::make_integer_sequence<int, kNeighbourVectors>());
}

template PixelProductKernel<float> pixel_product_kernel(int64_t, int64_t);
template PixelProductKernel<double> pixel_product_kernel(int64_t, int64_t);
template PixelProductKernel<float> pixel_product_neighbours_kernel(int64_t, int64_t);
template PixelProductKernel<double> pixel_product_neighbours_kernel(int64_t, int64_t);

}  // namespace torchconv::cpu
