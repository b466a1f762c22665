// Bands of channel pairs. Where channels are neighbours in memory pairs are copied as they are;
// where pixels are, two rows of pixels are joined into a row of pairs, and a register tile of such
// rows transposed.
#include "cpu/channel_pairs.h"

#include "cpu/conv_pack.h"

namespace torchconv::cpu {
namespace {

using Bits = Vec<uint32_t>;
constexpr int64_t kL = Bits::kLanes;

// Lanes of p[l*step], l < n, in the lower halves.
TORCHCONV_INLINE Bits::Type load_halves(const BFloat16* p, int64_t step, int64_t n,
                                        bool more_follow) {
  using Halves = Vec<uint16_t, kL>;
  if (step == 1)
    return convert<uint32_t, uint16_t, kL>(n == kL ? Halves::load(p) : Halves::load_partial(p, n));
  return bit_cast<Bits::Type>(load_lanes_strided(p, step, 0, n, more_follow)) >> 16;
}

}  // namespace

void transpose_pairs(const BFloat16* src, int64_t plane, int64_t step, int64_t count,
                     int64_t channels, float* to, int64_t pixel, int64_t width, int64_t kept,
                     int64_t gap) {
  const int64_t pairs = ceil_div(channels, int64_t{2});
  for (int64_t first = 0; first < pairs; first += kL) {
    const int64_t rows = std::min(kL, pairs - first);
    const BFloat16* from = src + 2 * first * plane;
    float* at = to + first;
    int64_t rest = width;
    for (int64_t p = 0; p < count; p += kL) {
      const int64_t n = std::min(kL, count - p);
      const bool more = p + kL < count;
      Bits::Type tile[kL];
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r) {
        tile[r] = Bits::Type{};
        if (r < rows) {
          const BFloat16* even = from + 2 * r * plane + p * step;
          tile[r] = load_halves(even, step, n, more);
          if (2 * (first + r) + 1 < channels)
            tile[r] |= load_halves(even + plane, step, n, more) << 16;
        }
      }
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) {
        if (l >= n) continue;
        if (rest > width - kept) {
          if (rows == kL)
            Bits::store(at, tile[l]);
          else
            Bits::store_partial(at, tile[l], rows);
          at += pixel;
        }
        if (--rest == 0) {
          rest = width;
          at += gap;
        }
      }
    }
  }
}

void copy_pairs(const BFloat16* src, int64_t step, int64_t count, int64_t channels, float* to,
                int64_t pixel) {
  using Halves = Vec<uint16_t>;
  const int64_t pairs = ceil_div(channels, int64_t{2});
  if (channels <= Halves::kLanes) {
    for (int64_t p = 0; p < count; ++p, src += step, to += pixel)
      Halves::store_partial(to, Halves::load_partial(src, channels), 2 * pairs);
    return;
  }
  for (int64_t p = 0; p < count; ++p, src += step, to += pixel) {
    if (channels % 2 == 0) {
      copy_wide(to, reinterpret_cast<const float*>(src), pairs);
      continue;
    }
    for (int64_t c = 0; c < channels; c += Halves::kLanes)
      Halves::store_partial(
          to + c / 2,
          Halves::load_partial(src + c, std::min<int64_t>(Halves::kLanes, channels - c)),
          std::min<int64_t>(Halves::kLanes, 2 * pairs - c));
  }
}

void fill_pairs(const ChannelBand& band, const ConvView& view, const BFloat16* src,
                int64_t channels, Range i, Range j, float* scratch) {
  const int64_t pixel = band.pixel, width = view.W;
  // Rows of the image below each other are one run of pixels, some of which are left out where only
  // a part of short rows is wanted: those from `first` on wait to be transposed.
  int64_t rows = 0, first = 0, size = 0;
  float* begin = nullptr;
  const auto transpose_rows = [&] {
    if (rows > 0)
      transpose_pairs(src + first, view.src.c, 1, (rows - 1) * width + size, channels, begin, pixel,
                      width, size, band.row - size * pixel);
    rows = 0;
  };
  band.for_pieces(view, i, j, [&](int64_t to, int64_t n, Range inside, int64_t from, int64_t step) {
    float* pixels = scratch + to;
    fill_zero(pixels, inside.begin * pixel);
    fill_zero(pixels + inside.end * pixel, (n - inside.end) * pixel);
    pixels += inside.begin * pixel;
    if (view.src.c == 1)
      return copy_pairs(src + from, step, inside.size(), channels, pixels, pixel);
    const bool joins = step == 1 && view.src.row == width && (inside.size() == width || width < kL);
    if (rows > 0 && joins && inside.size() == size && from == first + rows * width &&
        pixels == begin + rows * band.row) {
      ++rows;
      return;
    }
    transpose_rows();
    if (!joins)
      return transpose_pairs(src + from, view.src.c, step, inside.size(), channels, pixels, pixel);
    rows = 1;
    first = from;
    size = inside.size();
    begin = pixels;
  });
  transpose_rows();
}

}  // namespace torchconv::cpu
