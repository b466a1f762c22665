// The register tiles of Winograd's products.
#include "cpu/microkernels/winograd_gemm.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <typename T, int kRows, int kVectors>
void multiply(const WinogradGemm<T>& g) {
  using V = Vec<T>;
  constexpr int64_t kL = V::kLanes;
  typename V::Type sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[t][i] = typename V::Type{};

  const T* v = g.v;
  const T* u = g.u;
  const T* next = g.next;
  constexpr int64_t kStep = kWinogradStep<T>;  // of the kL channels that a vector holds
  for (int64_t rest = g.channels; rest > 0; rest -= kL) {
    const T* at = v;
    for (const T* end = v + (rest < kL ? rest : kL); at < end; at += kStep) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < kStep; ++c) {
        typename V::Type filters[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          filters[i] = V::load(u + i * kL);
          __builtin_prefetch(next + i * kL, 0, 2);
        }
#pragma GCC unroll 16
        for (int t = 0; t < kRows; ++t) {
          const typename V::Type x = V::broadcast(at[t * kL + c]);
#pragma GCC unroll 4
          for (int i = 0; i < kVectors; ++i) sum[t][i] += x * filters[i];
        }
        u += kPanel<T>;
        next += kPanel<T>;
      }
    }
    v += g.v_step;
  }

  T* m = g.m;
  if (g.accumulate) {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i)
        V::store(m + t * g.m_step + i * kL, V::load(m + t * g.m_step + i * kL) + sum[t][i]);
  } else {
#pragma GCC unroll 16
    for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) V::store(m + t * g.m_step + i * kL, sum[t][i]);
  }
}

template <typename T, int... kRow>
WinogradMicrokernel<T> find(int64_t rows, int64_t vectors, std::integer_sequence<int, kRow...>) {
  static_assert(kMaxVectors == 2, "a table for each number of vectors");
  static constexpr WinogradMicrokernel<T> kTable[kMaxVectors][kMaxRows] = {
      {multiply<T, kRow + 1, 1>...}, {multiply<T, kRow + 1, 2>...}};
  return kTable[vectors - 1][rows - 1];
}

}  // namespace

template <typename T>
WinogradMicrokernel<T> winograd_microkernel(int64_t rows, int64_t vectors) {
  return find<T>(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}
template WinogradMicrokernel<float> winograd_microkernel(int64_t, int64_t);
template WinogradMicrokernel<double> winograd_microkernel(int64_t, int64_t);

}  // namespace torchconv::cpu
