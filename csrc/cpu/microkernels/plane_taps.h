// The register tile of a convolution whose vectors run along the pixels of planes, read where they
// lie:
//
//   out[f][j] = clamp(bias[f] + before[f][j] + sum over channels c and taps t of
//                     w[c][t][f] * src[c*channel_step + offsets[t] + j])
//
// for a few filters f and `vectors` vectors of pixels j. Each vector of the source is loaded once
// for all of the filters.
#pragma once

#include <cstdint>

#include "cpu/lane_range.h"
#include "cpu/simd.h"

namespace torchconv::cpu {

// Filters of a tile, and vectors for so many: as many sums as there are registers for.
inline constexpr int kPlaneFilters = 8;
#if defined(__AVX512F__)
inline constexpr int kPlaneSums = 24, kPlaneVectors = 8;
#else
inline constexpr int kPlaneSums = 12, kPlaneVectors = 4;
#endif
constexpr int plane_vectors(int64_t filters) {
  const int64_t most = kPlaneSums / filters;
  return most < 1 ? 1 : most > kPlaneVectors ? kPlaneVectors : static_cast<int>(most);
}

using PlaneLanes = LaneRange<float, kVectorBytes / sizeof(float)>;

struct PlaneTile {
  const float* src;  // of the first channel
  int64_t channels, channel_step;
  const int64_t* offsets;  // [taps]
  int64_t taps;
  const float* w;  // [channel][tap][filter], where channels are channel_w apart
  int64_t channel_w;
  const PlaneLanes* inside;  // [tap][vector]: those that are read, or null for all
  const PlaneLanes* lanes;   // [vector]: those that are written, or null for all
  const float* bias;         // [filter], or null
  const float* before;       // null, or what is added, in rows of before_step
  int64_t before_step;
  float* out;
  int64_t out_step;
  int64_t ahead;  // from a channel to what is asked for of it meanwhile, or 0
  bool stream;    // past the caches: out is whole and aligned
  bool clamp;     // to [0, most], with NaN kept
  float most;
};

using PlaneTapsKernel = void (*)(const PlaneTile&);

// 1 <= filters <= kPlaneFilters, 1 <= vectors <= plane_vectors(filters). at_edge: of tiles that
// have `inside` and `lanes`.
PlaneTapsKernel plane_taps_kernel(int64_t filters, int64_t vectors, bool at_edge);

}  // namespace torchconv::cpu
