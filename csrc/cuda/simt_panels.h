// The register tile of the products whose panels come to shared memory as they lie, which
// winograd_gemm.cu and simt_planes.cu share: rows of both operands are terms, sixteen of them a
// panel, in three stages that cp.async fills.
//
// A warp is 4 x 8 threads of 8 x 8 sums. Neighbouring lanes are of one column and two rows: a read
// of 16 bytes by a warp is two passes through the banks where neighbours, or every second lane,
// read the same, and else four. Bound by the FMA units.
#pragma once

#include "cuda/element.h"

namespace torchconv::cuda::panels {

using Quad = Vector<float, 4>;

inline constexpr int kTerms = 16, kStages = 3;
inline constexpr int kSide = 8;                   // sums of a thread along each axis
inline constexpr int kSlots = kSide * kSide / 4;  // quads of them

template <int M, int N>
struct Tile {
  static constexpr int kM = M, kN = N;
  static constexpr int kThreads = (M / kSide) * (N / kSide);
  static constexpr int kBlocks = 512 / kThreads;  // that a multiprocessor is meant to hold
  static constexpr int kWarpsN = N / kSide / 8;

  struct Shared {
    float a[kStages][kTerms][M];
    float b[kStages][kTerms][N];
    Quad sums[kSlots][kThreads];  // of the chunks before, where there are several
  };

  // The position in the tile of a thread's first quads; the second ones are half a tile further.
  static __device__ __forceinline__ int first_m() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return (warp / kWarpsN * 4 + lane / 16 * 2 + lane % 2) * 4;
  }
  static __device__ __forceinline__ int first_n() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return (warp % kWarpsN * 8 + lane / 2 % 8) * 4;
  }
};

// A row of both panels, as far as a thread multiplies it.
struct Fragment {
  Quad a[2], b[2];
};

template <typename T>
__device__ __forceinline__ void read(const float* a, const float* b, int term, Fragment& f) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    f.a[i] = *reinterpret_cast<const Quad*>(a + term * T::kM + i * (T::kM / 2));
    f.b[i] = *reinterpret_cast<const Quad*>(b + term * T::kN + i * (T::kN / 2));
  }
}

// Row after row, there and back: an FMA then reads one factor that the one before it has read, and
// registers have no bandwidth for three.
__device__ __forceinline__ void add_products(const Fragment& f, float (&sums)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int step = 0; step < kSide; ++step) {
      const int j = i % 2 == 0 ? step : kSide - 1 - step;
      sums[i][j] = fmaf(f.a[i / 4].element[i % 4], f.b[j / 4].element[j % 4], sums[i][j]);
    }
}

// What leaves the registers of sums does so in quads whose pairs are turned: then ptxas keeps sums
// of even columns in odd registers, and the other way round, and an FMA, whose factor of that
// column came in a quad, reads both at once: a multiprocessor's registers have two banks.
__device__ __forceinline__ Quad to_slot(const float (&sums)[kSide][kSide], int slot) {
  const int i = slot / 2, j = slot % 2 * 4;
  return {{sums[i][j + 1], sums[i][j], sums[i][j + 3], sums[i][j + 2]}};
}
__device__ __forceinline__ Quad from_slot(const Quad& q) {
  return {{q.element[1], q.element[0], q.element[3], q.element[2]}};
}

template <typename T>
__device__ __forceinline__ void add_slots(const Quad* slots, float (&sums)[kSide][kSide]) {
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const Quad q = from_slot(slots[slot * T::kThreads]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[slot / 2][slot % 2 * 4 + i] += q.element[i];
  }
}

// Sixteen terms more, of panels from a thread's first row and column on.
template <typename T>
__device__ __forceinline__ void multiply_panels(const float* a, const float* b,
                                                float (&sums)[kSide][kSide]) {
  Fragment fragments[2];
  read<T>(a, b, 0, fragments[0]);
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    if (term + 1 < kTerms) read<T>(a, b, term + 1, fragments[(term + 1) % 2]);
    add_products(fragments[term % 2], sums);
  }
}

__device__ __forceinline__ void clear(float (&sums)[kSide][kSide]) {
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; ++j) sums[i][j] = 0;
}

}  // namespace torchconv::cuda::panels
