// The transforms of x and dz for the weight gradient in Winograd's domain. A segment's columns are
// transformed into a band that stays in the first-level cache, and this band's rows into the
// planes. Where pixels are neighbours in memory they are transposed in registers first.
#include "cpu/winograd_wgrad_operands.h"

#include "cpu/conv_pack.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu::winograd_gradient {
namespace {

using V = Vec<float>;
constexpr int64_t kL = V::kLanes;
constexpr int64_t kWidth = kPanel<float>;

template <typename S>
struct Source {
  static constexpr int kIn = S::kInput, kValues = S::kValues, kTile = S::kTile;
  static constexpr int kUnit = S::kStride;  // elements for each gradient
  static TORCHCONV_INLINE void apply(const Vector (&in)[kIn], Vector (&out)[kValues]) {
    S::source(in, out);
  }
};

template <typename S>
struct Gradient {
  static constexpr int kIn = S::kTile, kValues = S::kValues, kTile = S::kTile;
  static constexpr int kUnit = 1;
  static TORCHCONV_INLINE void apply(const Vector (&in)[kIn], Vector (&out)[kValues]) {
    S::gradient(in, out);
  }
};

// The rows of a tile, one vector of channels: columns are `step` elements apart.
struct BandRow {
  const float* at;
  int64_t step;
};

template <bool kWhole>
TORCHCONV_INLINE Vector load_channels(const float* p, int64_t n) {
  return kWhole ? V::load(p) : V::load_partial(p, n);
}

// Fetches the line `ahead` elements after p into the second-level cache, wherever that is.
TORCHCONV_INLINE void prefetch(const float* p, int64_t ahead) {
  const auto address = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead) * sizeof(*p);
  __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
}

// Columns [begin, end) of the band: from the rows to the values of each column.
template <typename Side, bool kWhole>
void transform_columns(const BandRow (&rows)[Side::kIn], int64_t begin, int64_t end, int64_t n,
                       int64_t ahead, float* band, int64_t band_row) {
  constexpr int kIn = Side::kIn, kValues = Side::kValues;
  for (int64_t j = begin; j < end; ++j) {
    Vector in[kIn], out[kValues];
#pragma GCC unroll 9
    for (int r = 0; r < kIn; ++r) {
      const float* at = rows[r].at + j * rows[r].step;
      in[r] = load_channels<kWhole>(at, n);
      if (kIn - r <= Side::kTile * Side::kUnit) prefetch(at, ahead);
    }
    Side::apply(in, out);
#pragma GCC unroll 9
    for (int r = 0; r < kValues; ++r) V::store(band + r * band_row + j * kL, out[r]);
  }
}

// From the columns of the band to the values of `count` tiles, the first `rows` rows of them.
template <typename Side, bool kNarrow>
void transform_rows(const float* band, int64_t band_row, int64_t rows, int64_t count, float* dst,
                    int64_t plane) {
  constexpr int kIn = Side::kIn, kValues = Side::kValues;
  constexpr int kRead = kNarrow ? kIn - Side::kUnit : kIn;
  constexpr int64_t kStep = (kNarrow ? Side::kTile - 1 : Side::kTile) * Side::kUnit * kL;
  for (int64_t t = 0; t < count; ++t, dst += kWidth, band += kStep) {
    for (int64_t r = 0; r < rows; ++r) {
      Vector in[kIn], out[kValues];
#pragma GCC unroll 9
      for (int s = 0; s < kIn; ++s)
        in[s] = s < kRead ? V::load(band + r * band_row + s * kL) : Vector{};
      Side::apply(in, out);
#pragma GCC unroll 9
      for (int s = 0; s < kValues - (kNarrow ? 1 : 0); ++s)
        V::store(dst + (r * kValues + s) * plane, out[s]);
    }
  }
}

template <typename Side>
void transform_segment(const Operand& x, const Segment& now, const Segment& next, int64_t v,
                       const Bands& bands, float* band) {
  constexpr int kIn = Side::kIn, kMore = kIn - Side::kTile * Side::kUnit;
  static constexpr float kZero[kL] = {};
  float* pixels = band + Side::kValues * bands.row;
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
  const float* data =
      x.data + now.n * stride.n + v * x.vector + top * stride.row + left * stride.column;
  const int64_t count = columns.end - columns.begin;
  BandRow rows[kIn];
  for (int r = 0; r < kIn; ++r)
    rows[r] = count > 0 && r >= range.begin && r < range.end
                  ? BandRow{data + r * row_stride, column_stride}
                  : BandRow{kZero, 0};
  const bool transposed = column_stride == 1;
  if (transposed && count > 0 && range.begin < range.end) {
    const float* src = data + range.begin * row_stride + columns.begin;
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
  float* planes = x.planes + v * kL / kWidth * x.panel + v * kL % kWidth;
  const int64_t values = now.height == Side::kTile ? Side::kValues : Side::kValues - 1;
  transform_rows<Side, false>(band, band_row, values, now.wide, planes + now.wide_at * kWidth,
                              x.plane);
  transform_rows<Side, true>(band + now.wide * Side::kTile * Side::kUnit * kL, band_row, values,
                             now.narrow, planes + now.narrow_at * kWidth, x.plane);
}

}  // namespace

// Rows of the band fall into different sets of a cache.
Bands::Bands(int64_t values, int64_t columns)
    : row((columns | 1) * kL), size(2 * values * row + kL * kL) {}

void transpose_pixels(const float* src, int64_t channel_stride, int64_t n, int64_t count,
                      int64_t ahead, float* pixels) {
  for (int64_t i = 0; i < count; i += kL, src += kL, pixels += kL * kL) {
    const int64_t last = std::min(kL, count - i);
    Vector tile[kL];
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
        tile[c] = c < n ? V::load_partial(src + c * channel_stride, last) : Vector{};
    }
    transpose_steps<1>(tile);
#pragma GCC unroll 16
    for (int c = 0; c < kL; ++c) V::store(pixels + c * kL, tile[c]);
  }
}

template <typename Scheme>
void transform_source(const Operand& x, const Segment& now, const Segment& next, int64_t v,
                      const Bands& bands, float* band) {
  transform_segment<Source<Scheme>>(x, now, next, v, bands, band);
}

template <typename Scheme>
void transform_gradient(const Operand& dz, const Segment& now, const Segment& next, int64_t v,
                        const Bands& bands, float* band) {
  transform_segment<Gradient<Scheme>>(dz, now, next, v, bands, band);
}

#define TORCHCONV_TRANSFORMS(Scheme)                                                              \
  template void transform_source<Scheme>(const Operand&, const Segment&, const Segment&, int64_t, \
                                         const Bands&, float*);                                   \
  template void transform_gradient<Scheme>(const Operand&, const Segment&, const Segment&,        \
                                           int64_t, const Bands&, float*);
TORCHCONV_TRANSFORMS(ThreeTaps)
TORCHCONV_TRANSFORMS(ThreeTapsStride2)
TORCHCONV_TRANSFORMS(FourTaps)
TORCHCONV_TRANSFORMS(FiveTaps)
#undef TORCHCONV_TRANSFORMS

}  // namespace torchconv::cpu::winograd_gradient
