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

template <typename T>
struct OuterProductTile {
  const T* a;  // [depth][kPanel], at the tile's first row
  const T* b;  // [depth][kPanel]
  T* c;        // [rows][kPanel]
  int64_t depth;
  bool accumulate;  // add to c, else overwrite it
  const T* next;    // [depth][kPanel], what a later tile reads: fetched into cache meanwhile
};

template <typename T>
using OuterProductMicrokernel = void (*)(const OuterProductTile<T>&);

// 1 <= rows <= kMaxRows, 1 <= vectors <= kMaxVectors; T is float or double.
template <typename T>
OuterProductMicrokernel<T> outer_product_microkernel(int64_t rows, int64_t vectors);

}  // namespace torchconv::cpu
