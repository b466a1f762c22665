// The destination side of Winograd's convolution: A^T m A, bias and epilogue for the tiles of a
// block.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/activation.h"
#include "cpu/source_prefetch.h"
#include "cpu/winograd_tiles.h"

namespace torchconv::cpu::winograd {

// Whether a lane is NaN.
template <typename Register>
bool has_nan(const Register& lanes) {
  constexpr int kCount = sizeof(lanes) / sizeof(lanes[0]);
  bool found = false;
  for (int l = 0; l < kCount; ++l) found |= lanes[l] != lanes[l];
  return found;
}

// Scratch for transform_products.
template <typename A>
int64_t product_scratch(const Plan<A>& plan, int64_t slots);

// Writes the outputs of one segment and panel from m, with bias[kPanel] of the panel added.
// False where an output, before its bias, is infinite or NaN: it is then not to be trusted.
// Instantiated for float, double, BFloat16 and Float16, as store_band is.
template <typename T>
bool transform_products(const Plan<Wide<T>>& plan, const Segment& segment, int64_t panel,
                        const Wide<T>* m, const Wide<T>* bias, const Epilogue<T>& epilogue,
                        Wide<T>* scratch);

// The same for one vector of filters, from `filter` on, whose columns have been transformed: m from
// winograd_column.h, bias of the vector.
template <typename T>
bool transform_column_products(const Plan<Wide<T>>& plan, const Segment& segment, int64_t filter,
                               const Wide<T>* m, const Wide<T>* bias, const Epilogue<T>& epilogue,
                               Wide<T>* scratch);

// What they are going to write of some filters, at y.
template <typename T>
void prefetch_destination(const Plan<Wide<T>>& plan, const Segment& segment, Range filters,
                          const T* y, SourcePrefetch& ahead);

// What an activation that clamps at most does to a vector, NaN kept.
template <typename A>
struct Clamp {
  using Register = typename Vec<A>::Type;
  Register low, high;

  template <typename T>
  explicit Clamp(const Epilogue<T>& epilogue)
      : low(Vec<A>::broadcast(epilogue.clamps() ? A{0} : -std::numeric_limits<A>::infinity())),
        high(Vec<A>::broadcast(epilogue.most())) {}
  TORCHCONV_INLINE Register operator()(Register z) const {
    z = z < low ? low : z;
    return z > high ? high : z;
  }
};

// Sends finished outputs, [row][column][kPanel] in a band, to where they belong: the first of
// `filters` at the first pixel to element dst. The band has band_size elements and is overwritten.
template <typename T>
void store_band(const ConvStrides& strides, int64_t dst, int64_t filters, int64_t rows,
                int64_t columns, const Epilogue<T>& epilogue, Wide<T>* band);
template <typename A>
constexpr int64_t band_size(int64_t pixels) {
  return kPanel<A> * (pixels + odd_lines<A>(pixels));
}

}  // namespace torchconv::cpu::winograd
