// The register tiles of Winograd's products.
#include "cpu/microkernels/winograd_gemm.h"

#include <utility>

namespace torchconv::cpu {
namespace {

template <int kRows, int kVectors>
void multiply(const WinogradGemm& g) {
  using V = Vec<float>;
  constexpr int64_t kL = V::kLanes;
  typename V::Type sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kRows; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) sum[t][i] = typename V::Type{};

  const float* v = g.v;
  const float* u = g.u;
  const float* next = g.next;
  // Four channels at a time; a vector of them holds kL.
  constexpr int64_t kStep = 4;
  for (int64_t rest = g.channels; rest > 0; rest -= kL) {
    const float* at = v;
    for (const float* end = v + (rest < kL ? rest : kL); at < end; at += kStep) {
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
        u += kPanel<float>;
        next += kPanel<float>;
      }
    }
    v += g.v_step;
  }

  float* m = g.m;
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

template <int... kRow>
WinogradMicrokernel find(int64_t rows, int64_t vectors, std::integer_sequence<int, kRow...>) {
  static_assert(kMaxVectors == 2, "a table for each number of vectors");
  static constexpr WinogradMicrokernel kTable[kMaxVectors][kMaxRows] = {{multiply<kRow + 1, 1>...},
                                                                        {multiply<kRow + 1, 2>...}};
  return kTable[vectors - 1][rows - 1];
}

}  // namespace

WinogradMicrokernel winograd_microkernel(int64_t rows, int64_t vectors) {
  return find(rows, vectors, std::make_integer_sequence<int, kMaxRows>());
}

}  // namespace torchconv::cpu
