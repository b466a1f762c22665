// F(2,3) down the columns for `kCount` tiles one below the other, of what one point of the rows
// has: sums alone, for group_winograd.h and group_winograd_planes.h.
#pragma once

#include "cpu/microkernels/group_winograd.h"

namespace torchconv::cpu {

// From the points of kCount * 2 + 2 source rows to those of the columns.
template <int kCount, typename Register>
TORCHCONV_INLINE void transform_columns(const float* points, const int64_t* rows,
                                        Register (&v)[kCount][kGroupWinogradDown]) {
  Register r[2 * kCount + 2];
#pragma GCC unroll 6
  for (int i = 0; i < 2 * kCount + 2; ++i) r[i] = Vec<float>::load(points + rows[i]);
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    v[t][0] = r[2 * t] - r[2 * t + 2];
    v[t][1] = r[2 * t + 1] + r[2 * t + 2];
    v[t][2] = r[2 * t + 2] - r[2 * t + 1];
    v[t][3] = r[2 * t + 1] - r[2 * t + 3];
  }
}

// And back, to kCount * 2 rows of outputs, so far apart.
template <int kCount, typename Register>
TORCHCONV_INLINE void finish_columns(const Register (&sums)[kCount][kGroupWinogradDown], float* to,
                                     int64_t row) {
#pragma GCC unroll 2
  for (int t = 0; t < kCount; ++t) {
    const auto& m = sums[t];
    Vec<float>::store(to + 2 * t * row, m[0] + (m[1] + m[2]));
    Vec<float>::store(to + (2 * t + 1) * row, (m[1] - m[2]) - m[3]);
  }
}

}  // namespace torchconv::cpu
