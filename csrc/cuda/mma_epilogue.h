// How the sums of a tensor-core kernel's tile become outputs: through shared memory, so that
// threads find sums that are neighbours in memory, then bias, residual, activation and rounding.
#pragma once

#include <algorithm>

#include "cuda/activation.h"
#include "cuda/mma_tile.h"

namespace torchconv::cuda {

template <typename Tile>
inline constexpr int kSumsPitch = Tile::kN + 8;  // floats; two neighbouring sums meet no other bank
template <typename Tile>
inline constexpr int kTileBytes =
    std::max(Tile::kStages * Tile::kStageBytes, 4 * Tile::kM * kSumsPitch<Tile>);

template <typename Tile>
__device__ __forceinline__ void leave_sums(const Sums<Tile>& sums, float* tile, int lane,
                                           int corner_m, int corner_n) {
  sums.for_each_pair(lane, [&](int row, int column, float first, float second) {
    float* to = tile + (corner_m + row) * kSumsPitch<Tile> + corner_n + column;
    *reinterpret_cast<Vector<float, 2>*>(to) = {{first, second}};
  });
}

template <int Count>
__device__ __forceinline__ void load_sums(float (&z)[Count], const float* sums) {
#pragma unroll
  for (int e = 0; e < Count; e += 4) {
    const Vector<float, 4> four = *reinterpret_cast<const Vector<float, 4>*>(sums + e);
#pragma unroll
    for (int i = 0; i < 4; ++i) z[e + i] = four.element[i];
  }
}

// Out of line, because an activation's code is long and the epilogue's loop is unrolled.
__attribute__((noinline)) inline __device__ float activate_apart(Activation activation, float z) {
  return activate(activation, z);
}

// Adds the residual to z, which has had its bias, and stores it where the pre-activation is wanted,
// and g(z): by load(tensor) and store(tensor, rounded values).
template <typename T, int Count, typename Load, typename Store>
__device__ __forceinline__ void finish(float (&z)[Count], const Epilogue<T>& epilogue, Load&& load,
                                       Store&& store) {
  if (epilogue.residual != nullptr) {
    const Vector<T, Count> residual = load(epilogue.residual);
#pragma unroll
    for (int e = 0; e < Count; ++e) z[e] += to_wide(residual.element[e]);
  }
  const auto round_and_store = [&](T* to) {
    Vector<T, Count> rounded;
#pragma unroll
    for (int e = 0; e < Count; ++e) rounded.element[e] = from_wide<T>(z[e]);
    store(to, rounded);
  };
  if (epilogue.preactivation != nullptr) round_and_store(epilogue.preactivation);
  if (epilogue.activation == Activation::kReLU) {
#pragma unroll
    for (int e = 0; e < Count; ++e) z[e] = activate(Activation::kReLU, z[e]);
  } else if (epilogue.activation != Activation::kNone) {
#pragma unroll
    for (int e = 0; e < Count; ++e) z[e] = activate_apart(epilogue.activation, z[e]);
  }
  round_and_store(epilogue.y);
}

}  // namespace torchconv::cuda
