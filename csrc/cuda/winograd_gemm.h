// The products of Winograd's algorithm: for each of the 36 points p
//
//   out[p][m][n] = sum over terms t of a[p][t][m] * b[p][t][n]
//
// in float32 FMAs on CUDA cores. Tiles are the columns n, or the terms; those that have no product
// with a point are left out of it.
#pragma once

#include <cstdint>

#include "cuda/queue.h"
#include "cuda/winograd_tiles.h"

namespace torchconv::cuda::winograd {

// Rows are whole quads and aligned to 16 bytes; what lies in a row past M or N is not read into a
// result, but may be written in `out`.
struct Gemm {
  const float *a, *b;
  float* out;
  int M, N;
  int a_width, b_width;      // of a row
  int64_t a_point, b_point;  // from one point to the next
  int out_width;
  int64_t out_point, out_slice;
  bool along_m;  // out[p][n][m]
  int terms;
  TileRanges tiles;
  bool tiles_are_terms;  // else they are the columns
  int slices;            // of tiles that are terms; out has the sums of each
};

constexpr int64_t round_to_quads(int64_t size) { return (size + 3) / 4 * 4; }

void multiply(const Gemm& gemm, const Queue& queue);

// The slices with which the weight's gradient ends soonest on a large device, whichever this one
// is.
int64_t slices_of(int64_t M, int64_t N, int64_t terms);

}  // namespace torchconv::cuda::winograd
