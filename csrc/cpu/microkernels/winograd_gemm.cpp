// The register tiles of Winograd's products.
#include "cpu/microkernels/winograd_gemm.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <int kRows>
void multiply(const WinogradGemm& g) {
  using V = Vec<float>;
  constexpr int64_t kL = V::kLanes;
  typename V::Type sum[kRows][kMaxVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < kMaxVectors; ++i) sum[t][i] = typename V::Type{};

  const float* v = g.v;
  const float* u = g.u;
  const float* next = g.next;
  for (int64_t vector = 0; vector < g.vectors; ++vector) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < kL; ++c) {
      typename V::Type filters[kMaxVectors];
#pragma GCC unroll 4
      for (int i = 0; i < kMaxVectors; ++i) {
        filters[i] = V::load(u + i * kL);
        __builtin_prefetch(next + i * kL, 0, 2);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kRows; ++t) {
        const typename V::Type x = V::broadcast(v[t * kL + c]);
#pragma GCC unroll 4
        for (int i = 0; i < kMaxVectors; ++i) sum[t][i] += x * filters[i];
      }
      u += kPanel<float>;
      next += kPanel<float>;
    }
    v += g.v_step;
  }

  float* m = g.m;
  if (g.accumulate) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kMaxVectors; ++i)
        V::store(m + t * g.m_step + i * kL, V::load(m + t * g.m_step + i * kL) + sum[t][i]);
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kMaxVectors; ++i) V::store(m + t * g.m_step + i * kL, sum[t][i]);
  }
}

template <int... kRow>
WinogradMicrokernel find(int64_t rows, std::integer_sequence<int, kRow...>) {
  static constexpr WinogradMicrokernel kTable[kMaxRows] = {multiply<kRow + 1>...};
  return kTable[rows - 1];
}

}  // namespace

WinogradMicrokernel winograd_microkernel(int64_t rows) {
  return find(rows, std::make_integer_sequence<int, kMaxRows>());
}

}  // namespace torchconv::cpu
