// See gate.h. Memory is rows of neighbours: a pixel's channels, or a channel's plane.
#include "cpu/gate.h"

#include <algorithm>

#include "cpu/parallel_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {
namespace {

// to[i] = f(from[i], i) of n elements, a vector at a time.
template <typename T, typename Factor>
TORCHCONV_INLINE void multiply(const T* from, T* to, int64_t n, const Factor& factor) {
  using V = Vec<T>;
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes)
    V::store(to + i, V::load(from + i) * factor(i, int64_t{V::kLanes}));
  if (i < n) V::store_partial(to + i, V::load_partial(from + i, n - i) * factor(i, n - i), n - i);
}

template <typename T>
void gate_rows(const GateProblem& p, const T* x, const T* gate, T* y, const Parallel& pool) {
  using V = Vec<T>;
  const bool planes = p.layout == Layout::kNCHW;
  const int64_t rows = p.N * (planes ? p.C : p.pixels), size = planes ? p.pixels : p.C;
  // Reading and writing an element takes longer than multiplying it.
  const double operations = 8.0 * static_cast<double>(size);
  WorkSplit(rows, operations).run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + row * size;
      T* to = y + row * size;
      if (planes) {
        const auto factor = V::broadcast(gate[row]);
        multiply(from, to, size, [&](int64_t, int64_t) { return factor; });
      } else {
        const T* factors = gate + row / p.pixels * p.C;
        multiply(from, to, size, [&](int64_t i, int64_t n) {
          return n == V::kLanes ? V::load(factors + i) : V::load_partial(factors + i, n);
        });
      }
    }
  });
}

}  // namespace

void gate_channels(const GateProblem& p, const void* x, const void* gate, void* y,
                   const Parallel& pool) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    gate_rows(p, static_cast<const T*>(x), static_cast<const T*>(gate), static_cast<T*>(y), pool);
  };
  return p.dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

void hardsigmoid(DType dtype, int64_t count, const void* x, void* y) {
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T* const from = static_cast<const T*>(x);
    T* const to = static_cast<T*>(y);
    // In this order a NaN stays one.
    for (int64_t i = 0; i < count; ++i)
      to[i] = std::min(std::max(from[i] + T{3}, T{0}), T{6}) / T{6};
  };
  return dtype == DType::kFloat64 ? run(double{}) : run(float{});
}

}  // namespace torchconv::cpu
