// The transforms of x and dz for the weight gradient in Winograd's domain. A segment's columns are
// transformed into a band that stays in the first-level cache, and this band's rows into the
// planes. Where pixels are neighbours in memory they are transposed in registers first.
#include "cpu/winograd_wgrad_operands.h"

#include "cpu/conv_pack.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu::winograd_gradient {
namespace {

template <typename S>
struct Source {
  static constexpr int kIn = S::kInput, kValues = S::kValues, kTile = S::kTile;
  static constexpr int kUnit = S::kStride;  // elements for each gradient
  template <typename V>
  static TORCHCONV_INLINE void apply(const V (&in)[kIn], V (&out)[kValues]) {
    S::source(in, out);
  }
};

template <typename S>
struct Gradient {
  static constexpr int kIn = S::kTile, kValues = S::kValues, kTile = S::kTile;
  static constexpr int kUnit = 1;
  template <typename V>
  static TORCHCONV_INLINE void apply(const V (&in)[kIn], V (&out)[kValues]) {
    S::gradient(in, out);
  }
};

// The rows of a tile, one vector of channels: columns are `step` elements apart.
template <typename A>
struct BandRow {
  const A* at;
  int64_t step;
};

template <bool kWhole, typename A>
TORCHCONV_INLINE Vector<A> load_channels(const A* p, int64_t n) {
  return kWhole ? Vec<A>::load(p) : Vec<A>::load_partial(p, n);
}

// Fetches the line `ahead` elements after p into the second-level cache, wherever that is.
template <typename A>
TORCHCONV_INLINE void prefetch(const A* p, int64_t ahead) {
  const auto address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead) * sizeof(*p);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Columns [begin, end) of the band: from the rows to the values of each column.
template <typename Side, bool kWhole, typename A>
void transform_columns(const BandRow<A> (&rows)[Side::kIn], int64_t begin, int64_t end, int64_t n,
                       int64_t ahead, A* band, int64_t band_row) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes;
  constexpr int kIn = Side::kIn, kValues = Side::kValues;
  for (int64_t j = begin; j < end; ++j) {
    Vector<A> in[kIn], out[kValues];
#pragma GCC unroll 9
    for (int r = 0; r < kIn; ++r) {
      const A* at = rows[r].at + j * rows[r].step;
      in[r] = load_channels<kWhole>(at, n);
      if (kIn - r <= Side::kTile * Side::kUnit) prefetch(at, ahead);
    }
    Side::apply(in, out);
#pragma GCC unroll 9
    for (int r = 0; r < kValues; ++r) V::store(band + r * band_row + j * kL, out[r]);
  }
}

// From the columns of the band to the values of `count` tiles, the first `rows` rows of them.
template <typename Side, bool kNarrow, typename A>
void transform_rows(const A* band, int64_t band_row, int64_t rows, int64_t count, A* dst,
                    int64_t plane, bool streams) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes, kWidth = kPanel<A>;
  constexpr int kIn = Side::kIn, kValues = Side::kValues;
  constexpr int kRead = kNarrow ? kIn - Side::kUnit : kIn;
  constexpr int64_t kStep = (kNarrow ? Side::kTile - 1 : Side::kTile) * Side::kUnit * kL;
  for (int64_t t = 0; t < count; ++t, dst += kWidth, band += kStep) {
    for (int64_t r = 0; r < rows; ++r) {
      Vector<A> in[kIn], out[kValues];
#pragma GCC unroll 9
      for (int s = 0; s < kIn; ++s)
        in[s] = s < kRead ? V::load(band + r * band_row + s * kL) : Vector<A>{};
      Side::apply(in, out);
#pragma GCC unroll 9
      for (int s = 0; s < kValues - (kNarrow ? 1 : 0); ++s)
        WideVec<A>::store(dst + (r * kValues + s) * plane, out[s], streams);
    }
  }
}

template <typename Side, typename A>
void transform_segment(const Operand<A>& x, const Segment& now, const Segment& next, int64_t v,
                       const Bands<A>& bands, A* band) {
  constexpr int64_t kL = kLanes<A>, kWidth = kPanel<A>;
  constexpr int kIn = Side::kIn, kMore = kIn - Side::kTile * Side::kUnit;
  static constexpr A kZero[kL] = {};
  A* pixels = band + Side::kValues * bands.row;
  const int64_t band_row = bands.row;
  const int64_t n = std::min(kL, x.channels - v * kL);
  const int64_t gradients = now.wide * Side::kTile + now.narrow * (Side::kTile - 1);
  const int64_t width = gradients * Side::kUnit + kMore;
  const int64_t height = now.height * Side::kUnit + kMore;
  const int64_t top = x.top + now.row * x.step_h, left = x.left + now.column * x.step_w;
  const Range columns = valid_range(width, x.spread_w, left, x.columns);
  const Range range = valid_range(height, x.spread_h, top, x.rows);
  const ConvStrides& stride = x.stride;
  const int64_t row_stride = stride.row * x.spread_h, column_stride = stride.column * x.spread_w;
  const int64_t ahead = (next.n - now.n) * stride.n + (next.row - now.row) * x.step_h * stride.row +
                        (next.column - now.column) * x.step_w * stride.column;
  const A* data =
      x.data + now.n * stride.n + v * x.vector + top * stride.row + left * stride.column;
  const int64_t count = columns.end - columns.begin;
  BandRow<A> rows[kIn];
  for (int r = 0; r < kIn; ++r)
    rows[r] = count > 0 && r >= range.begin && r < range.end
                  ? BandRow<A>{data + r * row_stride, column_stride}
                  : BandRow<A>{kZero, 0};
  const bool transposed = column_stride == 1;
  if (transposed && count > 0 && range.begin < range.end) {
    const A* src = data + range.begin * row_stride + columns.begin;
    if (count == row_stride) {
      transpose_pixels(src, stride.c, n, (range.end - range.begin) * count, ahead, pixels);
    } else {
      for (int64_t r = range.begin; r < range.end; ++r, src += row_stride)
        transpose_pixels(src, stride.c, n, count, ahead, pixels + (r - range.begin) * count * kL);
    }
    for (int64_t r = range.begin; r < range.end; ++r)
      rows[r] = {pixels + ((r - range.begin) * count - columns.begin) * kL, kL};
  }
  for (int r = 0; r < Side::kValues; ++r) {
    fill_zero(band + r * band_row, columns.begin * kL);
    fill_zero(band + r * band_row + columns.end * kL, (width - columns.end) * kL);
  }
  // A vector of a blocked operand is whole: the lanes beyond its channels hold zero.
  if (transposed)
    transform_columns<Side, true>(rows, columns.begin, columns.end, n, 0, band, band_row);
  else if (n == kL || x.stride.c == 0)
    transform_columns<Side, true>(rows, columns.begin, columns.end, n, ahead, band, band_row);
  else
    transform_columns<Side, false>(rows, columns.begin, columns.end, n, ahead, band, band_row);
  A* planes = x.planes + v * kL / kWidth * x.panel + v * kL % kWidth;
  const int64_t values = now.height == Side::kTile ? Side::kValues : Side::kValues - 1;
  transform_rows<Side, false>(band, band_row, values, now.wide, planes + now.wide_at * kWidth,
                              x.plane, x.streams);
  transform_rows<Side, true>(band + now.wide * Side::kTile * Side::kUnit * kL, band_row, values,
                             now.narrow, planes + now.narrow_at * kWidth, x.plane, x.streams);
}

}  // namespace

template <typename A>
void transpose_pixels(const A* src, int64_t channel_stride, int64_t n, int64_t count, int64_t ahead,
                      A* pixels) {
  using V = Vec<A>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t i = 0; i < count; i += kL, src += kL, pixels += kL * kL) {
    const int64_t last = std::min(kL, count - i);
    Vector<A> tile[kL];
    if (n == kL && last == kL) {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) {
        tile[c] = V::load(src + c * channel_stride);
        prefetch(src + c * channel_stride, ahead);
      }
    } else if (n == kL) {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c) {
        tile[c] = V::load_partial(src + c * channel_stride, last);
        prefetch(src + c * channel_stride, ahead);
      }
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kL; ++c)
        tile[c] = c < n ? V::load_partial(src + c * channel_stride, last) : Vector<A>{};
    }
    transpose_steps<1>(tile);
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) V::store(pixels + c * kL, tile[c]);
  }
}

template <typename Scheme, typename A>
void transform_source(const Operand<A>& x, const Segment& now, const Segment& next, int64_t v,
                      const Bands<A>& bands, A* band) {
  transform_segment<Source<Scheme>>(x, now, next, v, bands, band);
}

template <typename Scheme, typename A>
void transform_gradient(const Operand<A>& dz, const Segment& now, const Segment& next, int64_t v,
                        const Bands<A>& bands, A* band) {
  transform_segment<Gradient<Scheme>>(dz, now, next, v, bands, band);
}

#define TORCHCONV_TRANSFORMS(Scheme, A)                                                       \
  template void transform_source<Scheme>(const Operand<A>&, const Segment&, const Segment&,   \
                                         int64_t, const Bands<A>&, A*);                       \
  template void transform_gradient<Scheme>(const Operand<A>&, const Segment&, const Segment&, \
                                           int64_t, const Bands<A>&, A*);
TORCHCONV_TRANSFORMS(ThreeTaps, float)
TORCHCONV_TRANSFORMS(ThreeTaps, double)
TORCHCONV_TRANSFORMS(ThreeTapsStride2, float)
TORCHCONV_TRANSFORMS(ThreeTapsStride2, double)
TORCHCONV_TRANSFORMS(FourTaps, float)
TORCHCONV_TRANSFORMS(FourTaps, double)
TORCHCONV_TRANSFORMS(FiveTaps, float)
TORCHCONV_TRANSFORMS(FiveTaps, double)
#undef TORCHCONV_TRANSFORMS
template void transpose_pixels(const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void transpose_pixels(const double*, int64_t, int64_t, int64_t, int64_t, double*);

}  // namespace torchconv::cpu::winograd_gradient
