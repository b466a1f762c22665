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

// Channels that a kernel takes at a time.
template <typename T>
inline constexpr int64_t kWinogradStep = kLanes<T> < 4 ? kLanes<T> : 4;

template <typename T>
struct WinogradGemm {
  const T* v;
  const T* u;
  T* m;
  const T* next;     // as many elements as u has, or any address
  int64_t v_step;    // from one vector of channels to the next
  int64_t m_step;    // from one tile to the next
  int64_t channels;  // a multiple of kWinogradStep
  bool accumulate;   // add to m, else overwrite it
};

template <typename T>
using WinogradMicrokernel = void (*)(const WinogradGemm<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors: of the panel's filters, the first ones.
// T is float or double.
template <typename T>
WinogradMicrokernel<T> winograd_microkernel(int64_t rows, int64_t vectors = kMaxVectors);

}  // namespace torchconv::cpu
