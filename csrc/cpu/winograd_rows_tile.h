// The last step of winograd_rows.h for a register tile: from the sums of its points to outputs in
// the destination, of several tiles of a row and a vector of filters.
#pragma once

#include <algorithm>

#include "cpu/activation.h"
#include "cpu/conv_view.h"
#include "cpu/pool_simd.h"
#include "cpu/winograd_rows_transforms.h"

namespace torchconv::cpu::winograd::rows {

// Tiles whose products are in registers. Or one tile less, where no tile of a row is then in vain.
inline constexpr int kTiles = kVectorBytes == 64 ? 4 : 2;

struct RowOutputs {
  bool stream;  // past the caches: every vector of dst aligned and whole, but for missing pixels
  bool clamp;   // to [0, high], NaN kept
  float high;
  float* dst;
  int64_t dst_c, dst_column;
  int64_t pixels, filters;  // that exist
};

// Of a register tile: a whole number of vectors.
inline constexpr int kPixels = kTiles * kOutputs;
// With so few products to an output, stores that first read what they overwrite take longer than
// the products, from fewer bytes on than elsewhere (kStreamedBytes).
inline constexpr int64_t kStreamed = kStreamedBytes / 2 / static_cast<int64_t>(sizeof(float));

// Whether the kernel applies the epilogue: else outputs go to scratch first.
inline bool stores_directly(const ConvView& view, const Epilogue<float>& epilogue) {
  return epilogue.activates_only() && epilogue.clamps_at_most() &&
         (view.dst.c == 1 || view.dst.column == 1);
}

// But for what differs between tiles.
inline RowOutputs outputs_of(const ConvView& view, const Epilogue<float>& epilogue) {
  const bool direct = stores_directly(view, epilogue), transposed = view.dst.c != 1;
  RowOutputs to{};
  to.stream = direct && (transposed ? view.dst.c : view.dst.column) % Vec<float>::kLanes == 0 &&
              view.dst.row % Vec<float>::kLanes == 0 && view.dst.n % Vec<float>::kLanes == 0 &&
              WideVec<float>::streamable(epilogue.y + view.dst_offset) &&
              view.N * view.pixels() * view.K >= kStreamed;
  to.clamp = direct && epilogue.clamps();
  to.high = epilogue.most();
  to.dst_c = direct ? view.dst.c : transposed ? kPixels : 1;
  to.dst_column = direct ? view.dst.column : transposed ? 1 : Vec<float>::kLanes;
  return to;
}

// A tile from scratch.
inline void store_scratch(const RowOutputs& from, const ConvView& view,
                          const Epilogue<float>& epilogue, int64_t dst) {
  if (from.dst_column == 1) {
    for (int64_t f = 0; f < from.filters; ++f)
      epilogue.store(from.dst + f * from.dst_c, from.pixels, dst + f * view.dst.c, view.dst.column);
  } else {
    for (int64_t p = 0; p < from.pixels; ++p)
      epilogue.store(from.dst + p * from.dst_column, from.filters, dst + p * view.dst.column, 1);
  }
}

// Vectors along filters, where these are neighbours.
template <int kCount>
TORCHCONV_INLINE void store_filters(const RowOutputs& to, const Vec<float>::Type (&y)[kCount]) {
  using V = Vec<float>;
  float* const dst = to.dst;
  const int64_t column = to.dst_column, pixels = to.pixels, filters = to.filters;
  if (pixels == kCount && filters == V::kLanes && to.stream) {
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) stream_bytes(dst + p * column, y[p]);
  } else if (pixels == kCount && filters == V::kLanes) {
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) V::store(dst + p * column, y[p]);
  } else {
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p)
      if (p < pixels) V::store_partial(dst + p * column, y[p], filters);
  }
}

// Or along pixels.
template <int kCount>
TORCHCONV_INLINE void store_pixels(const RowOutputs& to, const Vec<float>::Type (&y)[kCount]) {
  using V = Vec<float>;
  constexpr int kL = V::kLanes;
  const int64_t row = to.dst_c, filters = to.filters;
#pragma GCC unroll 4
  for (int first = 0; first < kCount; first += kL) {
    const int64_t pixels = std::min<int64_t>(to.pixels - first, kL);
    if (pixels <= 0) break;
    float* const dst = to.dst + first;
    V::Type square[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i) square[i] = first + i < kCount ? y[first + i] : V::Type{};
    transpose_steps<1>(square);
    if (pixels == kL && filters == kL && to.stream) {
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) stream_bytes(dst + i * row, square[i]);
    } else if (pixels == kL && filters == kL) {
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i) V::store(dst + i * row, square[i]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kL; ++i)
        if (i < filters) V::store_partial(dst + i * row, square[i], pixels);
    }
  }
}

// Returns a vector with a NaN where a sum is not finite.
template <bool kTransposed, int kWide>
TORCHCONV_INLINE Vec<float>::Type store_outputs(const RowOutputs& to,
                                                const Vec<float>::Type (&sum)[kWide][kMostPoints]) {
  using V = Vec<float>;
  using Register = V::Type;
  constexpr int kCount = kWide * kOutputs;
  // Of a tile's outputs together: at worst a large sum is taken for an overflow.
  auto special = Register{};
  Register y[kCount];
#pragma GCC unroll 4
  for (int t = 0; t < kWide; ++t) {
    Register outputs[kOutputs];
    transform_output(sum[t], outputs);
    special += ((outputs[0] + outputs[1]) + (outputs[2] + outputs[3])) * Register{};
#pragma GCC unroll 4
    for (int i = 0; i < kOutputs; ++i) y[t * kOutputs + i] = outputs[i];
  }
  if (to.clamp) {
    const Register low{}, high = V::broadcast(to.high);
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) {
      y[p] = y[p] < low ? low : y[p];
      y[p] = y[p] > high ? high : y[p];
    }
  }
  if constexpr (kTransposed)
    store_pixels(to, y);
  else
    store_filters(to, y);
  return special;
}

// Whether one of the vectors that store_outputs returned had one.
inline bool has_nan(Vec<float>::Type special) {
  constexpr int kL = Vec<float>::kLanes;
  float lanes[kL];
  Vec<float>::store(lanes, special);
  return std::any_of(lanes, lanes + kL, [](float lane) { return lane != lane; });
}

}  // namespace torchconv::cpu::winograd::rows
