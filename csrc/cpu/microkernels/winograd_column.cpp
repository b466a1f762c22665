// The register tiles of a column of points: a line of filters for each point, and a broadcast for
// each point and tile.
#include "cpu/microkernels/winograd_column.h"

#include "cpu/microkernels/winograd_gemm.h"
#include "cpu/winograd_transforms.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using winograd::kPoints;

template <bool kTall, int kTiles>
void multiply_column(const WinogradColumn& g) {
  constexpr int64_t kL = V::kLanes, kStep = kWinogradStep<float>;
  constexpr int kRows = kTall ? kPoints : kPoints - 1, kOutputs = kTall ? 4 : 3;
  V::Type sum[kTiles][kPoints];
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 6
    for (int r = 0; r < kPoints; ++r) sum[t][r] = V::Type{};

  const float* v = g.v;
  const float* u = g.u;
  const float* next = g.next;
  const int64_t v_point = g.v_point, u_point = g.u_point;
  for (int64_t rest = g.channels; rest > 0; rest -= kL) {
    const float* v0 = v;
    for (const float* end = v + (rest < kL ? rest : kL); v0 < end; v0 += kStep) {
      const float* const v3 = v0 + 3 * v_point;
#pragma GCC unroll 4
      for (int64_t c = 0; c < kStep; ++c) {
        const float* const u3 = u + 3 * u_point;
        __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          V::Type filters = V::load(r < 3 ? u + r * u_point : u3 + (r - 3) * u_point);
          keep_in_register(filters);
          const float* at = r < 3 ? v0 + r * v_point : v3 + (r - 3) * v_point;
#pragma GCC unroll 4
          for (int t = 0; t < kTiles; ++t) sum[t][r] += V::broadcast(at[t * kL + c]) * filters;
        }
        u += kPanel<float>;
        next += kPanel<float>;
      }
    }
    v += g.v_step;
  }

#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    V::Type y[4];
    winograd::transform_output<kTall>(sum[t], y);
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) V::store(g.y + t * g.y_step + i * g.y_row, y[i]);
  }
}

}  // namespace

WinogradColumnKernel winograd_column_kernel(int64_t tiles, bool tall) {
  static constexpr WinogradColumnKernel kTable[2][kColumnTiles] = {
      {multiply_column<false, 1>, multiply_column<false, 2>, multiply_column<false, 3>,
       multiply_column<false, 4>},
      {multiply_column<true, 1>, multiply_column<true, 2>, multiply_column<true, 3>,
       multiply_column<true, 4>}};
  return kTable[tall ? 1 : 0][tiles - 1];
}

}  // namespace torchconv::cpu
