// The source is transformed as for the gather and dz as the weights are, tile by tile, to [point]
// [tile][row][lanes]: then each point is a weight gradient with three taps one below the other,
// summed over rows and tiles by the register tiles of microkernels/group_tile.h. The sums are
// transformed to those of the taps once for all tiles (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016, section 4.3).
#include "cpu/group_winograd_wgrad.h"

#include "cpu/group_winograd.h"
#include "cpu/winograd_wgrad_transforms.h"

namespace torchconv::cpu {
namespace {

using V = Vec<float>;
using Register = V::Type;
using Scheme = winograd_gradient::ThreeTaps;
constexpr int64_t kL = V::kLanes;
constexpr int kTaps = Scheme::kTaps, kPoints = Scheme::kValues, kOutputs = Scheme::kTile;
// Products that are added up in registers: of tiles that stay in the first-level cache.
constexpr int64_t kDotLength = 64;
// What a band may read of both images where it reads whole rows: half of the second-level cache.
constexpr int64_t kRowsBytes = 512 << 10;
// Bands that are enough for several threads.
constexpr int64_t kBandsWanted = 32;

// The shortest bands that the register tiles take.
int64_t short_bands(const ConvView& view) { return std::max<int64_t>(1, view.I / kDotTile); }

// A block's part of every pixel is a few lines, far from each other, which the processor does not
// foresee; and to ask for so many takes longer than their products do.
bool takes_whole_rows(const ConvView& view) {
  const ConvStrides &x = view.src, &dz = view.dst;
  const bool dense = x.c == 1 && x.column == view.groups * view.C && x.row == view.W * x.column &&
                     dz.c == 1 && dz.column == view.groups * view.K && dz.row == view.J * dz.column;
  const int64_t bands = short_bands(view);
  const int64_t bytes =
      ceil_div(view.I, bands) * (x.row + dz.row) * static_cast<int64_t>(sizeof(float));
  return dense && bytes <= kRowsBytes && view.N * bands >= kBandsWanted;
}

GroupBand dot_band(const ConvView& view) {
  GroupBand band = group_winograd_band(view);
  if (takes_whole_rows(view)) {
    band.band = ceil_div(view.I, short_bands(view));
    band.bands = ceil_div(view.I, band.band);
  }
  return band;
}

// In the order of memory. sum: where the compiler has to take the values.
void read_into_caches(const float* first, int64_t count, float* sum) {
  constexpr int64_t kAtOnce = 4 * kL;
  Register sums[4] = {};
  for (int64_t i = 0; i + kAtOnce <= count; i += kAtOnce) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] += V::load(first + i + k * kL);
  }
  V::store(sum, (sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows of kCount pixels to points `plane` elements apart. One pixel less than a tile has leaves
// infinity out.
template <int kCount>
void transform_pixels(const GroupPixels& pixels, int64_t rows, float* to, int64_t plane) {
  constexpr bool kSource = kCount > kOutputs;
  constexpr int kFull = kSource ? kPoints : kOutputs, kValues = kPoints - (kFull - kCount);
  const float* src = pixels.src;
  for (int64_t r = 0; r < rows; ++r, src += pixels.row, to += kL) {
    Register d[kFull] = {}, v[kPoints] = {};
    if (r >= pixels.begin && r < pixels.end) {
#pragma GCC unroll 6
      for (int s = 0; s < kCount; ++s) {
        d[s] = V::load(src + s * pixels.column);
        if (pixels.ahead != 0 && (!kSource || s >= kTaps - 1))
          __builtin_prefetch(src + s * pixels.column + pixels.ahead, 0, 2);
      }
      if constexpr (kSource)
        Scheme::source(d, v);
      else
        Scheme::gradient(d, v);
    }
#pragma GCC unroll 6
    for (int p = 0; p < kValues; ++p) V::store(to + p * plane, v[p]);
  }
}

}  // namespace

GroupWinogradDot::GroupWinogradDot(const ConvView& view)
    : view_(view),
      band_(dot_band(view)),
      reads_rows_(takes_whole_rows(view)),
      columns_(view.J, 1, kOutputs),
      lanes_(band_.source_lanes<float>(view)),
      tiles_(ceil_div(columns_.count, ceil_div(columns_.count * band_.band, kDotLength))),
      x_tile_((band_.band + kTaps - 1) * kL),
      dz_tile_(band_.band * kL) {}

int64_t GroupWinogradDot::sums() const {
  return band_.dst_vectors * kPoints * view_.C * kTaps * kL;
}

int64_t GroupWinogradDot::scratch() const {
  return (view_.src.c == 1 ? 0 : band_.size + band_.dst_vectors * band_.band * band_.width * kL) +
         kPoints * (x_tile_ + tiles_ * (x_tile_ + band_.dst_vectors * dz_tile_));
}

void GroupWinogradDot::expect_next(const float* dz, const float* x, int64_t block, int64_t i0,
                                   int64_t rows, SourcePrefetch& ahead) const {
  const bool same = i0 + rows < view_.I;
  const int64_t begin = same ? i0 + rows : 0, end = std::min(begin + band_.band, view_.I);
  const int64_t first = begin + band_.first_h;
  const Range read{std::max<int64_t>(first, 0), std::min(first + end - begin + kTaps - 1, view_.H)};
  const int64_t groups = band_.groups_in(view_, block);
  prefetch_planes(x + (same ? 0 : view_.src.n) + read.begin * view_.src.row, view_.src,
                  groups * view_.C, read.size(), view_.W, ahead);
  prefetch_planes(dz + (same ? 0 : view_.dst.n) + begin * view_.dst.row, view_.dst,
                  groups * view_.K, end - begin, view_.J, ahead);
}

void GroupWinogradDot::add(const float* dz, const float* x, int64_t block, const Range& together,
                           int64_t i0, int64_t rows, float* scratch, float* sums) const {
  const bool planes = view_.src.c != 1;
  const int64_t source_rows = rows + kTaps - 1, channels = band_.groups_in(view_, block) * view_.C;
  const int64_t dz_plane = planes ? band_.band * band_.width * kL : 0;
  float* const x_band = scratch;
  float* const dz_band = x_band + (planes ? band_.size : 0);
  float* const window = dz_band + band_.dst_vectors * dz_plane;
  float* const x_points = window + kPoints * x_tile_;
  float* const dz_points = x_points + kPoints * tiles_ * x_tile_;
  // In channels_last the next block's pixels are neighbours.
  if (reads_rows_ && block == together.begin) {
    // The band before this one read the rows that both need.
    const int64_t first = i0 + band_.first_h, begin = i0 > 0 ? first + kTaps - 1 : first;
    const Range inside{std::max<int64_t>(begin, 0), std::min(first + source_rows, view_.H)};
    read_into_caches(x + inside.begin * view_.src.row, inside.size() * view_.src.row, x_points);
    read_into_caches(dz + i0 * view_.dst.row, rows * view_.dst.row, dz_points);
  }
  const auto ahead = [&](const ConvStrides& s, int64_t own) -> int64_t {
    if (reads_rows_) return 0;
    return block + 1 < together.end ? own : rows * s.row - (block - together.begin) * own;
  };
  const auto dz_window = [&](int64_t v, int64_t j, int64_t columns) {
    const int64_t next = planes ? 0 : ahead(view_.dst, band_.dst_vectors * band_.vector_filters);
    return GroupWindow{
        view_.dst, band_.filters_in(view_, block, v), view_.I, view_.J, i0, rows, j, columns, next};
  };
  x += block * band_.groups * view_.C * view_.src.c;
  dz += block * band_.groups * view_.K * view_.dst.c;
  SourcePrefetch fetch;
  if (planes) {
    expect_next(dz, x, block, i0, rows, fetch);
    band_.fill<float>(view_, x - block * band_.groups * view_.C * view_.src.c, block, i0, x_band);
    for (int64_t v = 0; v < band_.dst_vectors; ++v)
      copy_group_window<float>(dz_window(v, 0, band_.width),
                               dz + v * band_.vector_filters * view_.dst.c, dz_band + v * dz_plane);
  }
  const int64_t dots = band_.dst_vectors * kPoints * ceil_div(view_.C, int64_t{kDotChannels});
  const int64_t lines =
      ceil_div(fetch.lines(), columns_.count * (1 + band_.dst_vectors) + this->dots() * dots);
  GroupDot<float> d{};
  d.count = rows;
  d.step = 1;
  d.dz_row = dz_tile_;
  d.src_row = x_tile_;
  for (int64_t first = 0; first < columns_.count; first += tiles_) {
    const int64_t tiles = std::min(tiles_, columns_.count - first);
    const int64_t full = std::min(tiles, columns_.fulls(first));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t j = columns_.begin(first + t), outputs = kOutputs - (t < full ? 0 : 1);
      const GroupPixels from =
          planes ? GroupPixels{x_band + j * kL, band_.width * kL, kL, 0, source_rows, 0}
                 : group_pixels({view_.src, channels, view_.H, view_.W, i0 + band_.first_h,
                                 source_rows, j + band_.first_w, outputs + kTaps - 1,
                                 ahead(view_.src, band_.groups * view_.C)},
                                x, window);
      fetch.ask(lines);
      (t < full ? transform_pixels<kPoints> : transform_pixels<kPoints - 1>)(from, source_rows,
                                                                             x_points + t * x_tile_,
                                                                             tiles_ * x_tile_);
      for (int64_t v = 0; v < band_.dst_vectors; ++v) {
        const GroupPixels gradient =
            planes ? GroupPixels{dz_band + v * dz_plane + j * kL, band_.width * kL, kL, 0, rows, 0}
                   : group_pixels(dz_window(v, j, outputs), dz + v * band_.vector_filters, window);
        fetch.ask(lines);
        (t < full ? transform_pixels<kOutputs>
                  : transform_pixels<kOutputs - 1>)(gradient, rows,
                                                    dz_points + v * kPoints * tiles_ * dz_tile_ +
                                                        t * dz_tile_,
                                                    tiles_ * dz_tile_);
      }
    }
    float* sum = sums;
    for (int64_t v = 0; v < band_.dst_vectors; ++v) {
      d.lanes = band_.groups > 1 ? lanes_.data() + v * kL : nullptr;
      for (int64_t p = 0; p < kPoints; ++p) {
        d.rows = p + 1 < kPoints ? tiles : full;
        d.src = x_points + p * tiles_ * x_tile_;
        d.dz = dz_points + (v * kPoints + p) * tiles_ * dz_tile_;
        for (int64_t c = 0; c < view_.C; c += kDotChannels) {
          d.first_channel = c;
          d.channels = std::min<int64_t>(kDotChannels, view_.C - c);
          d.sums = sum + c * kTaps * kL;
          fetch.ask(lines);
          if (d.rows > 0) group_dot(d, kTaps);
        }
        sum += view_.C * kTaps * kL;
      }
    }
  }
}

void GroupWinogradDot::transform(const float* sums, float* taps) const {
  const int64_t point = view_.C * kTaps * kL;
  for (int64_t v = 0; v < band_.dst_vectors; ++v, sums += kPoints * point)
    for (int64_t r = 0; r < kTaps; ++r)
      for (int64_t c = 0; c < view_.C; ++c, taps += kTaps * kL) {
        Register m[kPoints], y[kTaps];
        for (int p = 0; p < kPoints; ++p) m[p] = V::load(sums + p * point + (c * kTaps + r) * kL);
        Scheme::inverse(m, y);
        for (int s = 0; s < kTaps; ++s) V::store(taps + s * kL, y[s]);
      }
}

}  // namespace torchconv::cpu
