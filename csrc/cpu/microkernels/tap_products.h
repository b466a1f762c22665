// The register tile of a weight gradient whose vectors run along pixels:
//
//   sums[f][t] (+)= sum over j < count of dz[f*dz_step + j] * src[offset[t] + j]
//
// with vectors in place of scalars, for a few filters and any number of terms. Some filters and
// some terms share a tile: of f + t vectors that are read, f*t products are made, where a single
// filter (taps.h) reads as many vectors as it multiplies.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace torchconv::cpu {

inline constexpr int kMostFilters = 8;

template <typename A>
struct TapProducts {
  const A* dz;  // whose vectors are aligned
  const A* src;
  const int64_t* offsets;  // [terms]
  A* sums;                 // [filters][terms], a vector each
  int64_t filters, terms, dz_step;
  int64_t count;    // vectors
  bool accumulate;  // add to sums, else overwrite them
  // What to fetch into the second-level cache meanwhile. As many entries as a count may be read
  // from any index up to `fetches`.
  const void* const* fetch;
  int64_t fetches;
};

// 1 <= filters <= kMostFilters; A is float or double.
template <typename A>
void tap_products(const TapProducts<A>& products);

}  // namespace torchconv::cpu
