// The register-tile product of two transposed panels, for reductions that run along the rows of
// both operands (weight gradients):
//
//   c[m][n] (+)= sum over t < depth of a[t][m] * b[t][n],   m < rows, n < vectors*lanes
//
// All three have rows of kPanel elements, so every address is a constant offset from a pointer that
// advances by one row: neither operand is transposed or packed again.
#pragma once

#include "cpu/microkernels/gemm.h"

namespace torchconv::cpu {

struct OuterProductTile {
  const float* a;  // [depth][kPanel], at the tile's first row
  const float* b;  // [depth][kPanel]
  float* c;        // [rows][kPanel]
  int64_t depth;
  bool accumulate;    // add to c, else overwrite it
  const float* next;  // [depth][kPanel], what a later tile reads: fetched into cache meanwhile
};

using OuterProductMicrokernel = void (*)(const OuterProductTile&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors.
OuterProductMicrokernel outer_product_microkernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
