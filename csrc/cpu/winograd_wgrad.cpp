// The weight gradient of 3x3 kernels by Winograd's F(3x3, 4x4), dz cut into tiles of 4x4 and x into
// overlapping tiles of 6x6.
//
// Blocks of tiles are transformed, vectors along channels, into planes [36][panel][tile][kPanel];
// then each of the 36 points is a matrix product over the tiles of a block, K x C, and one inverse
// transform gives the nine taps. With a single block the products of a small K x C tile are
// inverted while they are in cache; otherwise blocks add to accumulators of all K x C, which are
// inverted every kFlushBlocks and added with compensation, so that the rounding error does not grow
// with the number of pixels. Blocks follow from the shape alone and every accumulator is summed in
// order, so the bits do not depend on the number of threads. The scheme is that of Lavin and Gray
// ("Fast Algorithms for Convolutional Neural Networks", 2016, section 4.3).
#include "cpu/winograd_wgrad.h"

#include <algorithm>
#include <atomic>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/outer_product.h"
#include "cpu/parallel_range.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu {
namespace {

using namespace winograd_wgrad_transforms;  // NOLINT: the vocabulary of this file
using V = Vec<float>;

constexpr int64_t kL = V::kLanes;
constexpr int64_t kWidth = kPanel<float>;
constexpr int64_t kTileElements = kWidth * kWidth;  // of a product's tile, panel by panel
constexpr int64_t kPlanes = kPoints * kPoints;
// The 36 streams of a transform fall into different cache sets.
constexpr int64_t kPlanePad = 16;

// Tiles of a row that one task transforms: its band of columns stays in a 32 KB first-level cache.
constexpr int64_t kSegmentTiles = 14;
// Tiles in a block: many against the traffic of the accumulators of K x C.
constexpr int64_t kBlockTiles = 128;
// Tiles that are added up in registers: few, for the accuracy of float32.
constexpr int64_t kProductTiles = 64;
// Blocks added up in the transformed domain before they go into the compensated sum.
constexpr int64_t kFlushBlocks = 8;
// Channels of either side whose accumulators (9 MB) stay in a last-level cache.
constexpr int64_t kSliceChannels = 256;

// x or dz: a slice of its channels, its tiles' geometry and its planes.
struct Operand {
  const float* data;  // at the slice's first channel
  ConvStrides stride;
  int64_t channels;
  int64_t top, left;      // of the first tile
  int64_t rows, columns;  // elements outside count as zero
  float* planes;
  int64_t plane;  // stride of planes
};

// An axis of dz cut into tiles of four and, where that covers it too, of three: these are tiles of
// four whose last element is zero, which makes their product at infinity zero.
struct TileAxis {
  int64_t wide, narrow;
  explicit TileAxis(int64_t size)
      : wide(ceil_div(size, kStep)), narrow(std::min(wide, wide * kStep - size)) {
    wide -= narrow;
  }
  int64_t count() const { return wide + narrow; }
  int64_t start(int64_t tile) const { return tile * kStep - std::max<int64_t>(0, tile - wide); }
};

// Neighbouring tiles of one row of tiles of a sample: wide ones, then narrow ones.
struct Segment {
  int64_t n, row, column;      // of the first element
  int64_t height;              // 4 or 3
  int64_t wide, narrow;        // tiles
  int64_t wide_at, narrow_at;  // the first of each in the planes
  int64_t width() const { return wide * kStep + narrow * (kStep - 1); }
};

// The planes hold the tiles of a block in the order 4x3, 4x4, 3x4, 3x3 (height by width), so that
// those which a point at infinity concerns are neighbours.
struct Block {
  int64_t segments;
  int64_t tiles[4];
  int64_t begin(int64_t s) const { return s == kPoints - 1 ? tiles[0] : 0; }
  int64_t end(int64_t r, int64_t s) const {
    return tiles[0] + tiles[1] + (r == kPoints - 1 ? 0 : tiles[2]) +
           (r == kPoints - 1 || s == kPoints - 1 ? 0 : tiles[3]);
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

// ---- Transforms of the operands.

// pixels[i][lane] for `count` neighbouring pixels of n channels; up to a vector of pixels beyond is
// overwritten. Prefetches the same pixels `ahead` elements on.
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

// Columns [begin, end) of the band: from kIn rows to the six points of each column.
template <int kIn, bool kWhole>
void transform_columns(const BandRow (&rows)[kIn], int64_t begin, int64_t end, int64_t n,
                       int64_t ahead, float* band, int64_t band_row) {
  for (int64_t j = begin; j < end; ++j) {
    Vector in[kIn], out[kPoints];
#pragma GCC unroll 6
    for (int r = 0; r < kIn; ++r) {
      const float* at = rows[r].at + j * rows[r].step;
      in[r] = load_channels<kWhole>(at, n);
      if (kIn - r <= kStep) prefetch(at, ahead);
    }
    transform(in, out);
#pragma GCC unroll 6
    for (int r = 0; r < kPoints; ++r) V::store(band + r * band_row + j * kL, out[r]);
  }
}

// From the columns of the band to the points of `count` tiles, the first `points` rows of them.
template <int kIn, bool kNarrow>
void transform_rows(const float* band, int64_t band_row, int64_t points, int64_t count, float* dst,
                    int64_t plane) {
  constexpr int kWide = kNarrow ? 0 : 1;
  for (int64_t t = 0; t < count; ++t, dst += kWidth, band += (kStep - 1 + kWide) * kL) {
    for (int64_t r = 0; r < points; ++r) {
      Vector in[kIn], out[kPoints];
#pragma GCC unroll 6
      for (int s = 0; s < kIn - 1 + kWide; ++s) in[s] = V::load(band + r * band_row + s * kL);
      if constexpr (kNarrow) in[kIn - 1] = Vector{};
      transform(in, out);
#pragma GCC unroll 6
      for (int s = 0; s < kPoints - 1 + kWide; ++s)
        V::store(dst + (r * kPoints + s) * plane, out[s]);
    }
  }
}

// Channels [c, c + kL) of a segment's tiles. `next` is the segment that follows. band and pixels
// are scratch of kPoints rows.
template <int kIn>
void transform_segment(const Operand& x, const Segment& segment, const Segment& next, int64_t tiles,
                       int64_t c, float* band, float* pixels, int64_t band_row) {
  static constexpr float kZero[kL] = {};
  const int64_t n = std::min(kL, x.channels - c);
  const int64_t width = segment.width() + kIn - kStep;
  const int64_t height = segment.height + kIn - kStep;
  const int64_t top = x.top + segment.row, left = x.left + segment.column;
  const int64_t begin = std::min(std::max(-left, int64_t{0}), width);
  const int64_t end = std::max(std::min(x.columns - left, width), begin);
  const int64_t first = std::min(std::max(-top, int64_t{0}), height);
  const int64_t last = std::max(std::min(x.rows - top, height), first);
  const int64_t ahead = (next.n - segment.n) * x.stride.n +
                        (next.row - segment.row) * x.stride.row +
                        (next.column - segment.column) * x.stride.column;
  const float* data = x.data + segment.n * x.stride.n + c * x.stride.c + top * x.stride.row +
                      left * x.stride.column;
  const bool inside = begin < end;
  BandRow rows[kIn];
  for (int r = 0; r < kIn; ++r)
    rows[r] = inside && r >= first && r < last ? BandRow{data + r * x.stride.row, x.stride.column}
                                               : BandRow{kZero, 0};
  const bool transposed = x.stride.column == 1;
  if (transposed && inside && first < last) {
    const int64_t columns = end - begin;
    const float* src = data + first * x.stride.row + begin;
    if (columns == x.stride.row) {
      transpose_pixels(src, x.stride.c, n, (last - first) * columns, ahead, pixels);
    } else {
      for (int64_t r = first; r < last; ++r, src += x.stride.row)
        transpose_pixels(src, x.stride.c, n, columns, ahead, pixels + (r - first) * columns * kL);
    }
    for (int64_t r = first; r < last; ++r)
      rows[r] = {pixels + ((r - first) * columns - begin) * kL, kL};
  }
  for (int r = 0; r < kPoints; ++r) {
    fill_zero(band + r * band_row, begin * kL);
    fill_zero(band + r * band_row + end * kL, (width - end) * kL);
  }
  if (transposed)
    transform_columns<kIn, true>(rows, begin, end, n, 0, band, band_row);
  else if (n == kL)
    transform_columns<kIn, true>(rows, begin, end, n, ahead, band, band_row);
  else
    transform_columns<kIn, false>(rows, begin, end, n, ahead, band, band_row);
  float* planes = x.planes + c / kWidth * tiles * kWidth + c % kWidth;
  const int64_t points = segment.height + kPoints - kStep;
  transform_rows<kIn, false>(band, band_row, points, segment.wide,
                             planes + segment.wide_at * kWidth, x.plane);
  transform_rows<kIn, true>(band + segment.wide * kStep * kL, band_row, points, segment.narrow,
                            planes + segment.narrow_at * kWidth, x.plane);
}

// ---- The inverse transform.

// One vector of filters' taps from the 36 points, `plane` apart.
TORCHCONV_INLINE void inverse_tile(const float* m, int64_t plane, Vector (&taps)[kTaps * kTaps]) {
  Vector rows[kTaps][kPoints];
#pragma GCC unroll 6
  for (int s = 0; s < kPoints; ++s) {
    Vector in[kPoints], out[kTaps];
#pragma GCC unroll 6
    for (int r = 0; r < kPoints; ++r) in[r] = V::load(m + (r * kPoints + s) * plane);
    inverse_transform(in, out);
#pragma GCC unroll 3
    for (int r = 0; r < kTaps; ++r) rows[r][s] = out[r];
  }
#pragma GCC unroll 3
  for (int r = 0; r < kTaps; ++r) {
    Vector out[kTaps];
    inverse_transform(rows[r], out);
#pragma GCC unroll 3
    for (int s = 0; s < kTaps; ++s) taps[r * kTaps + s] = out[s];
  }
}

// sum += x, with what rounding loses in `lost` (Knuth's two-sum).
TORCHCONV_INLINE void add_compensated(Vector x, Vector& sum, Vector& lost) {
  const Vector total = sum + x, part = total - sum;
  lost += (sum - (total - part)) + (x - part);
  sum = total;
}

// n filters of nine neighbouring taps, in reverse for a flipped kernel.
template <bool kFlip>
TORCHCONV_INLINE void store_filters(const Vector (&taps)[kTaps * kTaps], float* dw, int64_t n) {
  constexpr int kCount = kTaps * kTaps;
#pragma GCC unroll 3
  for (int t = 0; t + 1 < kCount; t += kL) {
    Vector tile[kL];
#pragma GCC unroll 16
    for (int i = 0; i < kL; ++i)
      tile[i] = t + i < kCount ? taps[kFlip ? kCount - 1 - t - i : t + i] : Vector{};
    transpose_steps<1>(tile);
#pragma GCC unroll 16
    for (int l = 0; l < kL; ++l)
      if (l < n) V::store_partial(dw + l * kCount + t, tile[l], std::min<int64_t>(kL, kCount - t));
  }
  if constexpr (kCount % kL == 1)
    for (int64_t l = 0; l < n; ++l) dw[l * kCount + kCount - 1] = taps[kFlip ? 0 : kCount - 1][l];
}

class WinogradWgrad {
 public:
  WinogradWgrad(const ConvView& view, const float* dz, const float* x, float* dw)
      : view_(view),
        dz_(dz),
        x_(x),
        dw_(dw),
        rows_(view.I),
        columns_(view.J),
        row_segments_(ceil_div(columns_.count(), kSegmentTiles)),
        segment_(ceil_div(columns_.count(), row_segments_)) {
    row_segments_ = ceil_div(columns_.count(), segment_);
    segments_ = view.N * rows_.count() * row_segments_;
    block_segments_ = std::max<int64_t>(1, kBlockTiles / segment_);
    blocks_ = ceil_div(segments_, block_segments_);
    block_segments_ = ceil_div(segments_, blocks_);
    blocks_ = ceil_div(segments_, block_segments_);
    tiles_ = block_segments_ * segment_;
    flushes_ = ceil_div(blocks_, kFlushBlocks);
    slice_c_ = slice(view.C);
    slice_k_ = slice(view.K);
    x_plane_ = round_up(slice_c_, kWidth) * tiles_ + kPlanePad;
    dz_plane_ = round_up(slice_k_, kWidth) * tiles_ + kPlanePad;
    band_row_ = (((segment_ - 1) * kStep + kInput) | 1) * kL;
  }

  bool run(const Parallel& pool) {
    Scratch scratch(*this);
    for (int64_t c = 0; c < view_.C; c += slice_c_) {
      for (int64_t k = 0; k < view_.K; k += slice_k_) {
        Slice s;
        s.c0 = c;
        s.k0 = k;
        s.C = std::min(slice_c_, view_.C - c);
        s.K = std::min(slice_k_, view_.K - k);
        for (int64_t b = 0; b < blocks_; ++b) {
          const Block block = plan_block(b, scratch.segments.get());
          transform_block(scratch, s, block, pool);
          if (blocks_ == 1) {
            multiply_and_invert(scratch, s, block, pool);
            continue;
          }
          accumulate(scratch, s, block, b % kFlushBlocks > 0, pool);
          if (b % kFlushBlocks == kFlushBlocks - 1 || b == blocks_ - 1)
            invert(scratch, s, b / kFlushBlocks, pool);
        }
      }
    }
    return finite_.load();
  }

 private:
  // Channels [c0, c0 + C) and filters [k0, k0 + K).
  struct Slice {
    int64_t c0, C, k0, K;
    int64_t c_panels() const { return ceil_div(C, kWidth); }
    int64_t k_panels() const { return ceil_div(K, kWidth); }
    int64_t products() const { return c_panels() * k_panels(); }
    int64_t product_plane() const { return products() * kTileElements + kPlanePad; }
  };

  struct Scratch {
    explicit Scratch(const WinogradWgrad& w)
        : segments(w.block_segments_),
          x(kPlanes * w.x_plane_),
          dz(kPlanes * w.dz_plane_),
          bands(WorkSplit::kMaxSlots * 2 * w.band_size()),
          products(w.product_elements()),
          sums(w.flushes_ > 1 ? 2 * kTaps * kTaps * w.slice_products() * kTileElements : 0) {}
    Buffer<Segment> segments;  // of the current block
    Buffer<float> x, dz, bands;
    Buffer<float> products;  // of all K x C of a slice, or of one tile for each task
    Buffer<float> sums;      // [product][row][vector][sum, lost][tap][lane]
  };

  static int64_t slice(int64_t channels) {
    return round_up(ceil_div(channels, ceil_div(channels, kSliceChannels)), kWidth);
  }
  int64_t slice_products() const { return ceil_div(slice_c_, kWidth) * ceil_div(slice_k_, kWidth); }
  int64_t band_size() const { return kPoints * band_row_ + kL * kL; }
  static constexpr int64_t kLocalPlane = kTileElements + kPlanePad;
  int64_t product_elements() const {
    return blocks_ == 1 ? WorkSplit::kMaxSlots * kPlanes * kLocalPlane
                        : kPlanes * (slice_products() * kTileElements + kPlanePad);
  }

  Block plan_block(int64_t block, Segment* segments) const {
    const int64_t first = block * block_segments_;
    Block b{std::min(block_segments_, segments_ - first), {}};
    for (int64_t i = 0; i < b.segments; ++i) {
      const int64_t row = (first + i) / row_segments_, n = row / rows_.count();
      const int64_t tile = (first + i) % row_segments_ * segment_;
      const int64_t count = std::min(segment_, columns_.count() - tile);
      Segment& s = segments[i];
      s.n = n;
      s.row = rows_.start(row % rows_.count());
      s.column = columns_.start(tile);
      s.height = row % rows_.count() < rows_.wide ? kStep : kStep - 1;
      s.wide = std::min(std::max<int64_t>(0, columns_.wide - tile), count);
      s.narrow = count - s.wide;
      b.tiles[s.height == kStep ? 1 : 2] += s.wide;
      b.tiles[s.height == kStep ? 0 : 3] += s.narrow;
    }
    int64_t at[4] = {};
    for (int type = 1; type < 4; ++type) at[type] = at[type - 1] + b.tiles[type - 1];
    for (int64_t i = 0; i < b.segments; ++i) {
      Segment& s = segments[i];
      int64_t& wide = at[s.height == kStep ? 1 : 2];
      int64_t& narrow = at[s.height == kStep ? 0 : 3];
      s.wide_at = wide;
      s.narrow_at = narrow;
      wide += s.wide;
      narrow += s.narrow;
    }
    return b;
  }

  void transform_block(const Scratch& scratch, const Slice& s, const Block& block,
                       const Parallel& pool) const {
    // Elements of x beyond the last output's window belong to no product.
    const ConvTap& origin = view_.taps[0];
    const Operand x{x_ + s.c0 * view_.src.c,
                    view_.src,
                    s.C,
                    origin.h,
                    origin.w,
                    std::min(view_.H, origin.h + view_.I + kTaps - 1),
                    std::min(view_.W, origin.w + view_.J + kTaps - 1),
                    scratch.x.get(),
                    x_plane_};
    const Operand dz{dz_ + s.k0 * view_.dst.c, view_.dst, s.K, 0, 0, view_.I, view_.J,
                     scratch.dz.get(),         dz_plane_};
    const int64_t x_vectors = ceil_div(s.C, kL), vectors = x_vectors + ceil_div(s.K, kL);
    const bool pixels_contiguous = view_.src_pixels_contiguous();
    const WorkSplit split(block.segments * vectors, static_cast<double>(segment_ * kPlanes * kL));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* band = scratch.bands.get() + slot * 2 * band_size();
      float* pixels = band + band_size();
      for (int64_t item = begin; item < end; ++item) {
        // In memory order: a channel's rows, or a pixel's channels.
        const int64_t i = pixels_contiguous ? item % block.segments : item / vectors;
        const int64_t v = pixels_contiguous ? item / block.segments : item % vectors;
        const Segment& now = scratch.segments[i];
        const Segment& next = scratch.segments[std::min(i + 1, block.segments - 1)];
        if (v < x_vectors)
          transform_segment<kInput>(x, now, next, tiles_, v * kL, band, pixels, band_row_);
        else
          transform_segment<kStep>(dz, now, next, tiles_, (v - x_vectors) * kL, band, pixels,
                                   band_row_);
      }
    });
  }

  // Two panels [depth][kWidth] and their product [kWidth filters][kWidth channels], over the tiles
  // of a block, of one point.
  struct Panels {
    const float *dz, *x;
    int64_t depth;
  };
  Panels panels(const Scratch& scratch, const Block& block, int64_t plane, int64_t kp,
                int64_t cp) const {
    const int64_t begin = block.begin(plane % kPoints);
    return {scratch.dz.get() + plane * dz_plane_ + (kp * tiles_ + begin) * kWidth,
            scratch.x.get() + plane * x_plane_ + (cp * tiles_ + begin) * kWidth,
            block.end(plane / kPoints, plane % kPoints) - begin};
  }

  // `next` is fetched into cache.
  void multiply(const Slice& s, const Panels& p, const Panels& next, int64_t kp, int64_t cp,
                float* product, bool accumulate) const {
    const int64_t rows = std::min(kWidth, s.K - kp * kWidth);
    const int64_t vectors = ceil_div(std::min(kWidth, s.C - cp * kWidth), kL);
    const int64_t parts = ceil_div(rows, kMaxRows);
    const int64_t runs = std::max<int64_t>(1, ceil_div(p.depth, kProductTiles));
    for (int64_t part = 0, row = 0; part < parts; ++part) {
      const int64_t n = rows / parts + (part < rows % parts ? 1 : 0);
      const OuterProductMicrokernel tile = outer_product_microkernel(n, vectors);
      const float* fetch = part == 0 ? next.x : next.dz;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t t = run * p.depth / runs, depth = (run + 1) * p.depth / runs - t;
        tile({p.dz + t * kWidth + row, p.x + t * kWidth, product + row * kWidth, depth,
              accumulate || run > 0, fetch + t * kWidth});
      }
      row += n;
    }
  }

  void accumulate(const Scratch& scratch, const Slice& s, const Block& block, bool add,
                  const Parallel& pool) const {
    const double operations = static_cast<double>(tiles_ * kWidth * s.C);
    const WorkSplit split(kPlanes * s.k_panels(), operations);
    const int64_t per_plane = s.products();
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      const int64_t last = end * s.c_panels() - 1;
      for (int64_t item = begin * s.c_panels(); item <= last; ++item) {
        const auto panels_of = [&](int64_t i) {
          return panels(scratch, block, i / per_plane, i % per_plane / s.c_panels(),
                        i % s.c_panels());
        };
        const int64_t plane = item / per_plane, i = item % per_plane;
        multiply(s, panels_of(item), panels_of(std::min(item + 1, last)), i / s.c_panels(),
                 i % s.c_panels(),
                 scratch.products.get() + plane * s.product_plane() + i * kTileElements, add);
      }
    });
  }

  void invert(const Scratch& scratch, const Slice& s, int64_t flush, const Parallel& pool) {
    const WorkSplit split(s.products(), static_cast<double>(kPlanes * kTileElements));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t item = begin; item < end; ++item)
        invert_product(scratch, s, item, scratch.products.get() + item * kTileElements,
                       s.product_plane(), flush);
    });
  }

  // All of one block: a tile of K x C is inverted while its products are in cache.
  void multiply_and_invert(const Scratch& scratch, const Slice& s, const Block& block,
                           const Parallel& pool) {
    const WorkSplit split(s.products(), static_cast<double>(tiles_ * kTileElements * kPlanes));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      float* product = scratch.products.get() + slot * kPlanes * kLocalPlane;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t kp = item / s.c_panels(), cp = item % s.c_panels();
        for (int64_t plane = 0; plane < kPlanes; ++plane)
          multiply(s, panels(scratch, block, plane, kp, cp),
                   panels(scratch, block, std::min(plane + 1, kPlanes - 1), kp, cp), kp, cp,
                   product + plane * kLocalPlane, false);
        invert_product(scratch, s, item, product, kLocalPlane, 0);
      }
    });
  }

  void invert_product(const Scratch& scratch, const Slice& s, int64_t item, const float* product,
                      int64_t plane, int64_t flush) {
    const int64_t k0 = item / s.c_panels() * kWidth, c0 = item % s.c_panels() * kWidth;
    const int64_t rows = std::min(kWidth, s.K - k0), columns = std::min(kWidth, s.C - c0);
    auto check = Vector{};  // NaN once any tap is not finite
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; column += kL) {
        Vector taps[kTaps * kTaps];
        inverse_tile(product + row * kWidth + column, plane, taps);
        if (flushes_ > 1) {
          float* sum = scratch.sums.get() +
                       (item * kTileElements + row * kWidth + column) * 2 * kTaps * kTaps;
          float* lost = sum + kTaps * kTaps * kL;
          for (int t = 0; t < kTaps * kTaps; ++t, sum += kL, lost += kL) {
            Vector total = flush > 0 ? V::load(sum) : Vector{};
            Vector rest = flush > 0 ? V::load(lost) : Vector{};
            add_compensated(taps[t], total, rest);
            V::store(sum, total);
            V::store(lost, rest);
            taps[t] = total + rest;
          }
        }
#pragma GCC unroll 9
        for (int t = 0; t < kTaps * kTaps; ++t) check += taps[t] * 0.0f;
        if (flush == flushes_ - 1)
          store_taps(taps, s.k0 + k0 + row, s.c0 + c0 + column, std::min(kL, columns - column));
      }
    }
    bool finite = true;
    for (int l = 0; l < kL; ++l) finite = finite && check[l] == 0;
    if (!finite) finite_.store(false);
  }

  void store_taps(const Vector (&taps)[kTaps * kTaps], int64_t k, int64_t c, int64_t n) const {
    float* dw = dw_ + k * view_.weight_k + c * view_.weight_c;
    if (view_.weight_c == 1) {
#pragma GCC unroll 9
      for (int t = 0; t < kTaps * kTaps; ++t)
        V::store_partial(dw + view_.taps[t].weight, taps[t], n);
    } else if (view_.taps[0].weight == 0) {
      store_filters<false>(taps, dw, n);
    } else {
      store_filters<true>(taps, dw, n);
    }
  }

  const ConvView& view_;
  const float* dz_;
  const float* x_;
  float* dw_;
  TileAxis rows_, columns_;
  int64_t row_segments_, segment_, segments_;  // in a row of tiles, tiles in one, in all
  int64_t block_segments_, blocks_, tiles_, flushes_;
  int64_t slice_c_, slice_k_;
  int64_t x_plane_, dz_plane_, band_row_;
  std::atomic<bool> finite_{true};
};

}  // namespace

bool winograd_wgrad_applies(const ConvView& view) {
  constexpr int kCount = kTaps * kTaps;
  if (view.groups != 1 || view.taps.size() != kCount || view.step_h != 1 || view.step_w != 1)
    return false;
  // Nine live taps of a larger kernel are not neighbours.
  if (view.weight_c != 1 && view.weight_c != kCount) return false;
  for (int t = 0; t < kCount; ++t)
    if (view.taps[t].h != view.taps[0].h + t / kTaps ||
        view.taps[t].w != view.taps[0].w + t % kTaps)
      return false;
  return true;
}

bool winograd_wgrad(const ConvView& view, const float* dz, const float* x, float* dw,
                    const Parallel& pool) {
  return WinogradWgrad(view, dz, x, dw).run(pool);
}

}  // namespace torchconv::cpu
