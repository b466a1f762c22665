// The batched product of winograd_gemm.h. A block owns a tile of one point's product. Both
// operands' rows are terms, so that panels of sixteen terms come to shared memory as they lie, by
// cp.async in three stages (simt_panels.h). Bound by the FMA units.
//
// A sum is taken in chunks of kChunk terms whose sums are added, as in simt_tile.h.
#include <algorithm>
#include <cstddef>

#include "core/range.h"
#include "cuda/element.h"
#include "cuda/shared_memory.h"
#include "cuda/simt_panels.h"
#include "cuda/tensor_core.h"
#include "cuda/winograd_gemm.h"
#include "cuda/winograd_transforms.h"

namespace torchconv::cuda::winograd {
namespace {

using namespace panels;

constexpr int kChunk = 128;

__host__ __device__ __forceinline__ int terms_a_slice(int terms, int slices) {
  return ((terms + slices - 1) / slices + kTerms - 1) / kTerms * kTerms;
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    winograd_multiply(const __grid_constant__ Gemm p) {
  auto& shared = *dynamic_shared<typename T::Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned m_tiles = static_cast<unsigned>((p.M + T::kM - 1) / T::kM);
  const int m0 = static_cast<int>(blockIdx.x % m_tiles) * T::kM;
  int n0 = static_cast<int>(blockIdx.x / m_tiles) * T::kN;
  const int point = static_cast<int>(blockIdx.y), slice = static_cast<int>(blockIdx.z);
  int first_term = 0, terms = p.terms;
  if (p.tiles_are_terms) {
    const int begin = p.tiles.begin(point), all = p.tiles.end(point) - begin;
    const int each = terms_a_slice(all, p.slices);
    first_term = begin + slice * each;
    terms = max(min(each, all - slice * each), 0);
  } else {
    n0 += p.tiles.begin(point) / 4 * 4;
    if (n0 >= p.tiles.end(point)) return;
  }
  const int steps = (terms + kTerms - 1) / kTerms;

  // A thread copies the same columns of every few rows.
  constexpr int kRowsA = T::kThreads / (T::kM / 4), kRowsB = T::kThreads / (T::kN / 4);
  const int row_a = thread / (T::kM / 4), column_a = thread % (T::kM / 4) * 4;
  const int row_b = thread / (T::kN / 4), column_b = thread % (T::kN / 4) * 4;
  const bool inside_a = m0 + column_a < p.a_width, inside_b = n0 + column_b < p.b_width;
  const float* from_a =
      p.a + point * p.a_point + int64_t{first_term + row_a} * p.a_width + m0 + column_a;
  const float* from_b =
      p.b + point * p.b_point + int64_t{first_term + row_b} * p.b_width + n0 + column_b;
  const SharedAddress to_a = shared_address(&shared.a[0][row_a][column_a]);
  const SharedAddress to_b = shared_address(&shared.b[0][row_b][column_b]);
  constexpr int kFloat = static_cast<int>(sizeof(float));
  const auto load = [&](int step, int stage) {
    const int rest = terms - step * kTerms;
#pragma unroll
    for (int row = 0; row < kTerms; row += kRowsA)
      copy_async<16>(to_a + static_cast<SharedAddress>((stage * kTerms + row) * T::kM * kFloat),
                     from_a + int64_t{row} * p.a_width, inside_a && row_a + row < rest);
#pragma unroll
    for (int row = 0; row < kTerms; row += kRowsB)
      copy_async<16>(to_b + static_cast<SharedAddress>((stage * kTerms + row) * T::kN * kFloat),
                     from_b + int64_t{row} * p.b_width, inside_b && row_b + row < rest);
    from_a += int64_t{kTerms} * p.a_width;
    from_b += int64_t{kTerms} * p.b_width;
  };

  float sums[kSide][kSide];
  clear(sums);
  Quad* before = &shared.sums[0][thread];

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) load(stage, stage);
    copy_async_commit();
  }
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (step > 0 && step % (kChunk / kTerms) == 0) {
      if (step > kChunk / kTerms) add_slots<T>(before, sums);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) before[slot * T::kThreads] = to_slot(sums, slot);
      clear(sums);
    }
    const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
    if (step + kStages - 1 < steps) load(step + kStages - 1, free_stage);
    copy_async_commit();
    const float* a = &shared.a[stage][0][T::first_m()];
    const float* b = &shared.b[stage][0][T::first_n()];
    multiply_panels<T>(a, b, sums);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  if (steps > kChunk / kTerms) add_slots<T>(before, sums);

  // Through the thread's own shared memory, four rows at a time, where the panels were.
  __syncthreads();
  Quad* own = reinterpret_cast<Quad*>(&shared.a[0][0][0]) + thread;
  static_assert(kSlots / 2 * T::kThreads * sizeof(Quad) <= offsetof(typename T::Shared, sums));
  float* out = p.out + slice * p.out_slice + point * p.out_point;
  const int m = m0 + T::first_m(), n = n0 + T::first_n();
  const int end = p.tiles_are_terms ? p.N : p.tiles.end(point);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int slot = 0; slot < kSlots / 2; ++slot)
      own[slot * T::kThreads] = to_slot(sums, half * (kSlots / 2) + slot);
    __syncwarp();
    const int row = m + half * (T::kM / 2);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int column = n + part * (T::kN / 2);
      Quad rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = from_slot(own[(2 * i + part) * T::kThreads]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.along_m) {
          if (column + i < end && row < p.out_width)
            *reinterpret_cast<Quad*>(out + int64_t{column + i} * p.out_width + row) = {
                {rows[0].element[i], rows[1].element[i], rows[2].element[i], rows[3].element[i]}};
        } else if (row + i < p.M && column < p.out_width) {
          *reinterpret_cast<Quad*>(out + int64_t{row + i} * p.out_width + column) = rows[i];
        }
      }
    }
    __syncwarp();
  }
}

// The tile of the least cost by the sums that it has and the product has not: of one side of 64 a
// block reads more for an FMA. The large tile has more shared memory than some devices' blocks.
template <typename F>
auto with_tile(int64_t M, int64_t N, bool may_be_large, F&& f) {
  const auto area = [&](int64_t m, int64_t n, double share) {
    return static_cast<double>(ceil_div(M, m) * m * (ceil_div(N, n) * n)) / share;
  };
  const double large = area(128, 128, 1.0), medium = area(64, 128, 0.95);
  const double small = area(64, 64, 0.85);
  if (may_be_large && large <= std::min(medium, small)) return f(Tile<128, 128>{});
  if (medium <= small) return f(Tile<64, 128>{});
  return f(Tile<64, 64>{});
}

}  // namespace

void multiply(const Gemm& gemm, const Queue& queue) {
  const size_t most = static_cast<size_t>(shared_of_block(queue.capability));
  with_tile(gemm.M, gemm.N, sizeof(Tile<128, 128>::Shared) <= most, [&](auto tile) {
    using T = decltype(tile);
    const int64_t tiles = ceil_div(gemm.M, T::kM) * ceil_div(gemm.N, T::kN);
    const int slices = gemm.tiles_are_terms ? gemm.slices : 1;
    const int terms = gemm.tiles_are_terms ? terms_a_slice(gemm.tiles.count, slices) : gemm.terms;
    launch(winograd_multiply<T>,
           dim3(static_cast<unsigned>(tiles), kProducts, static_cast<unsigned>(slices)),
           T::kThreads,
           static_cast<int>(terms > kChunk ? sizeof(typename T::Shared)
                                           : offsetof(typename T::Shared, sums)),
           queue, gemm);
  });
}

int64_t slices_of(int64_t M, int64_t N, int64_t terms) {
  constexpr int64_t kMultiprocessors = 132, kLeastTerms = 128, kMostSlices = 64;
  return with_tile(M, N, /*may_be_large=*/true, [&](auto tile) {
    using T = decltype(tile);
    const int64_t tiles = ceil_div(M, T::kM) * ceil_div(N, T::kN) * kProducts;
    const int64_t most = std::clamp<int64_t>(terms / kLeastTerms, 1, kMostSlices);
    int64_t best = 1;
    double least = 0;
    for (int64_t slices = 1; slices <= most; ++slices) {
      // In terms of a tile: the rounds of blocks, and what writing and reading a slice's sums
      // takes.
      const int64_t rounds = ceil_div(tiles * slices, kMultiprocessors * T::kBlocks);
      const double each = static_cast<double>(ceil_div(terms, slices)) + 16;
      const double cost =
          static_cast<double>(rounds) * each +
          T::kM * T::kN / 1024.0 * static_cast<double>(tiles * slices) / kMultiprocessors;
      if (slices == 1 || cost < least) best = slices, least = cost;
    }
    return best;
  });
}

}  // namespace torchconv::cuda::winograd
