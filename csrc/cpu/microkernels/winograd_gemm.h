// The products in Winograd's domain: for one point, the register tile
//
//   m[t][n] (+)= sum over c of v[t][c] * u[c][n],   t < rows tiles, n < kPanel filters
//
// v is [c / lanes][tile][lanes]: the tiles of one vector of channels lie in a row, so a register
// tile may start at any of them and every broadcast has a constant offset. u is a panel
// [c][kPanel]. While it multiplies, the kernel fetches what comes next into the second-level cache:
// a core runs through U or V faster than the hardware notices where the next piece starts.
#pragma once

#include <cstdint>

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

struct WinogradGemm {
  const float* v;
  const float* u;
  float* m;
  const float* next;  // as many elements as u has, or any address
  int64_t v_step;     // from one vector of channels to the next
  int64_t m_step;     // from one tile to the next
  int64_t channels;   // a multiple of four
  bool accumulate;    // add to m, else overwrite it
};

using WinogradMicrokernel = void (*)(const WinogradGemm&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors: of the panel's filters, the first ones.
WinogradMicrokernel winograd_microkernel(int64_t rows, int64_t vectors = kMaxVectors);

}  // namespace torchconv::cpu
