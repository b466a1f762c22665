// The register tile of shared_taps.h: outputs of a vector of filters, several in a row for each of
// a few lines,
//
//   out[l*line_step + i*step + k] = bias[k] + sum over channels c < depth and taps t of
//     source[l*source_line + (i + t)*source_step + c] * weights[(c*taps + t)*kL + k]
//
// An element that is broadcast serves all taps.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

// Outputs of a tile: all in a line, or in as many lines as rows.
#if defined(__AVX512F__)
inline constexpr int kSharedTapsOutputs = 16, kSharedTapsLines = 4;
#else
inline constexpr int kSharedTapsOutputs = 8, kSharedTapsLines = 2;
#endif

struct SharedTapsTile {
  const float* source;
  int64_t source_line, source_step;
  const float* weights;
  const float* bias;
  int64_t depth;
  int64_t lanes;  // of the filters that exist
  bool clamps;    // the outputs, to [0, most]
  float most;
  float* out;
  BFloat16* rounded;  // of pairs, or null: where it goes instead of out
  int64_t line_step, step;
};

using SharedTapsMicrokernel = void (*)(const SharedTapsTile&);

inline constexpr bool has_shared_taps(int64_t taps) { return taps == 3 || taps == 5; }

// one_line: of the two tiles.
SharedTapsMicrokernel shared_taps_microkernel(int64_t taps, bool one_line);
// The same where has_pair_products(): a channel is a pair of bfloat16 in 32 bits.
SharedTapsMicrokernel shared_taps_pair_microkernel(int64_t taps, bool one_line);

}  // namespace torchconv::cpu
