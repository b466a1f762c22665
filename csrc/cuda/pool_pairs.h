// Averages of disjoint 2x2 windows that cover the image (NCHW), where rows of a plane are not whole
// vectors: rows of all planes follow each other in memory, two of them are a row of outputs.
//
// Forward: a thread has a few outputs, of which neighbours lie in neighbouring threads, and loads
// two elements of each of their rows. Backward: a thread writes vectors of dx. Nothing goes through
// shared memory, all loads of a thread are under way at once. Bound: bytes moved.
#pragma once

#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

inline constexpr int kPairThreads = 128;
inline constexpr int kPairOutputs = 4;  // of a thread

template <typename T>
__global__ void __launch_bounds__(kPairThreads)
    average_pairs(Quotient<int32_t> by_width, int32_t width, int32_t outputs, Wide<T> divisor,
                  const T* __restrict__ x, T* __restrict__ y) {
  using V = Vector<T, 2>;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * (kPairThreads * kPairOutputs) +
                        static_cast<int32_t>(threadIdx.x);
  V upper[kPairOutputs], lower[kPairOutputs];
#pragma unroll
  for (int i = 0; i < kPairOutputs; i++) {
    const int32_t output = min(first + i * kPairThreads, outputs - 1);
    const T* const from = x + 2 * (output + by_width.of(output) * width);
    upper[i] = *reinterpret_cast<const V*>(from);
    lower[i] = *reinterpret_cast<const V*>(from + 2 * width);
  }
  const Division<Wide<T>> over(divisor);
#pragma unroll
  for (int i = 0; i < kPairOutputs; i++) {
    const int32_t output = first + i * kPairThreads;
    if (output >= outputs) break;
    y[output] = from_wide<T>(over((to_wide(upper[i].element[0]) + to_wide(upper[i].element[1])) +
                                  (to_wide(lower[i].element[0]) + to_wide(lower[i].element[1]))));
  }
}

// `width` outputs a row; `vectors` of dx.
template <typename T>
__global__ void __launch_bounds__(kPairThreads)
    spread_pairs(Quotient<int32_t> by_width, int32_t width, int32_t vectors, Wide<T> divisor,
                 const T* __restrict__ dy, T* __restrict__ dx) {
  constexpr int n = kLanes<T>;
  const int32_t vector =
      static_cast<int32_t>(blockIdx.x) * kPairThreads + static_cast<int32_t>(threadIdx.x);
  if (vector >= vectors) return;
  int32_t row = vector * (n / 2);  // of dx; at first the number of a pair
  int32_t column = by_width.split(row);
  T value[n / 2];
#pragma unroll
  for (int j = 0; j < n / 2; j++) {
    value[j] = dy[row / 2 * width + column];
    if (++column == width) column = 0, ++row;
  }
  const Division<Wide<T>> over(divisor);
#pragma unroll
  for (int j = 0; j < n / 2; j++) value[j] = from_wide<T>(over(to_wide(value[j])));
  store_all<T, n>(dx + vector * n, [&](int k) { return value[k / 2]; });
}

// Whether averages are of disjoint 2x2 windows that cover the image, in NCHW, and rows are no whole
// vectors.
template <typename T>
bool pairs_cover(const PoolShape& s) {
  const auto cover = [](const PoolAxis& a) {
    return a.taps == 2 && a.stride == 2 && a.pad == 0 && a.dilation == 1 && a.size == 2 * a.out;
  };
  return s.channels == 1 && !s.adaptive && s.w.size % kLanes<T> != 0 && cover(s.h) && cover(s.w);
}

// Each runs its kernel where it takes the problem, and says whether.
template <typename T>
bool run_average_pairs(const PoolShape& s, int64_t planes, const T* x, T* y, const Queue& queue) {
  if (!pairs_cover<T>(s) || !aligned<T>(x, 2)) return false;
  const int64_t outputs = planes * s.h.out * s.w.out;
  const Wide<T> divisor = s.divisor != 0 ? static_cast<Wide<T>>(s.divisor) : Wide<T>{4};
  launch(average_pairs<T>,
         dim3(static_cast<unsigned>(ceil_div(outputs, int64_t{kPairThreads * kPairOutputs}))),
         dim3(kPairThreads), 0, queue, Quotient<int32_t>(s.w.out), static_cast<int32_t>(s.w.out),
         static_cast<int32_t>(outputs), divisor, x, y);
  return true;
}

template <typename T>
bool run_spread_pairs(const PoolShape& s, int64_t planes, const T* dy, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t total = planes * s.h.size * s.w.size;
  if (!pairs_cover<T>(s) || !aligned<T>(dx, n) || total % n != 0) return false;
  const Wide<T> divisor = s.divisor != 0 ? static_cast<Wide<T>>(s.divisor) : Wide<T>{4};
  launch(spread_pairs<T>, dim3(static_cast<unsigned>(ceil_div(total / n, int64_t{kPairThreads}))),
         dim3(kPairThreads), 0, queue, Quotient<int32_t>(s.w.out), static_cast<int32_t>(s.w.out),
         static_cast<int32_t>(total / n), divisor, dy, dx);
  return true;
}

}  // namespace torchconv::cuda
