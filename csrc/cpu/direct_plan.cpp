// The sizes behind direct_plan.h: a block repays its preparation, its band lies in the second-level
// cache beside the weights, and there are blocks for several threads.
#include "cpu/direct_plan.h"

#include <algorithm>
#include <cstdlib>

#include "cpu/direct_gemm.h"

namespace torchconv::cpu {
namespace {

// What a block's band may take of the second-level cache.
constexpr int64_t kBandBytes = 384 << 10;
// Or, where weights are larger than that, this part of theirs.
constexpr int64_t kWeightsOfBands = 4;
// Outputs in a block: enough to repay its preparation.
constexpr int64_t kBlockPixels = 224, kBlockProducts = 1 << 20;
// Tiles of a block, from which it is of whole ones: its last would take as long with fewer rows.
constexpr int64_t kTilesEnough = 4;
// Threads that are to have equally many of an image's blocks, where these are more.
constexpr int64_t kThreads = 4;
// Of the first-level cache, at least: so many lines may fall into the same set.
constexpr int64_t kCacheWays = 8;
// Blocks of an image, for several threads, and panels of filters of which one more is few.
constexpr int64_t kBlocksWanted = 6, kPanelsAlike = 8, kPanelsAlikeFewPixels = 4;

bool all_inside(const ConvView& view, const ConvTap& tap) {
  const Range h = valid_range(view.I, view.step_h, tap.h, view.H);
  const Range w = valid_range(view.J, view.step_w, tap.w, view.W);
  return h.begin == 0 && h.end == view.I && w.begin == 0 && w.end == view.J;
}

// Whether several taps are read where they lie, all outputs through the taps that reach the image:
// where there is no padding, or a pixel meets so few products that copying it first would take as
// long as some of them. Taps along one axis leave but two runs of outputs that read fewer, and a
// pixel with few products.
bool taps_in_place(const ConvView& view, int64_t filter_bytes) {
  constexpr int64_t kFewProducts = 4, kFewAlongAxis = 64, kWide = 2 * kMaxRows;
  constexpr int64_t kMostOffset = int64_t{1} << 29;
  const auto taps = static_cast<int64_t>(view.taps.size());
  const auto of_all = [&](const auto& f) {
    return std::all_of(view.taps.begin(), view.taps.end(), f);
  };
  if (taps < 2 || !of_all([&](const ConvTap& tap) {
        return std::abs(tap.h) < kMostOffset / view.src.row &&
               std::abs(tap.w) < kMostOffset / view.src.column;
      }))
    return false;
  if (of_all([&](const ConvTap& tap) { return all_inside(view, tap); })) return true;
  const bool along_axis = of_all([&](const ConvTap& tap) { return tap.h == view.taps[0].h; }) ||
                          of_all([&](const ConvTap& tap) { return tap.w == view.taps[0].w; });
  return taps * ceil_div(filter_bytes, kVectorBytes) <=
             (along_axis ? kFewAlongAxis : kFewProducts) &&
         view.step_h == 1 && view.step_w == 1 && view.J >= kWide;
}

}  // namespace

DirectPlan::DirectPlan(const ConvView& view, int64_t element_size, bool in_place_possible,
                       int64_t pixel)
    : channels(direct_gemm_chunk(view, element_size)),
      chunks(std::max<int64_t>(1, ceil_div(view.C, channels))),
      padded_filters(round_up(view.K, kVectorBytes / element_size)) {
  const int64_t pixels = std::clamp(kBlockProducts / std::max<int64_t>(1, view.terms() * view.K),
                                    kBlockPixels, 4 * kBlockPixels);
  columns = even_piece(view.J, pixels);
  rows = even_piece(view.I, pixels / columns);
  const bool aliased = pixel * element_size % kAliasedBytes == 0;
  const bool one_tap = view.taps.size() == 1 && all_inside(view, view.taps[0]);
  const bool in_place = in_place_possible && (chunks == 1 || one_tap) &&
                        (one_tap || taps_in_place(view, padded_filters * element_size));
  if (in_place && view.I == 1 && one_tap) {
    int64_t blocks = ceil_div(view.J, columns);
    const int64_t images = view.N * view.groups;
    if (blocks > 1 || direct_plan_cuts_pixels(view, element_size)) {
      // As many for each of two or four threads, which would otherwise have to share filters.
      const int64_t multiple = blocks > kThreads ? kThreads : 2;
      while (blocks * images % multiple != 0) ++blocks;
      columns = even_piece(view.J, ceil_div(view.J, blocks));
    }
  }
  if (in_place && aliased) tile_rows = std::min<int64_t>(kMaxRows, kCacheWays);
  if (in_place && view.I == 1 && one_tap && columns < view.J && columns >= kTilesEnough * tile_rows)
    columns = round_up(columns, tile_rows);
  // Rows that several blocks read are copied for each of them, or asked for by each.
  const int64_t halo =
      view.taps.empty() ? 0 : std::abs(view.taps.back().h - view.taps.front().h) / view.step_h;
  if (in_place)
    while (rows < std::min(2 * halo, view.I / kBlocksWanted)) rows = even_piece(view.I, 2 * rows);
  if (view.terms() > 0 && !in_place) {
    const auto try_block = [&](int64_t block_rows, int64_t block_columns, int64_t limit) {
      band.emplace(view, block_rows, block_columns, channels, element_size);
      return band->size() * element_size <= limit;
    };
    while (rows < std::min(2 * halo, view.I / kBlocksWanted) &&
           try_block(even_piece(view.I, 2 * rows), columns, kBandBytes / 2))
      rows = even_piece(view.I, 2 * rows);
    while (!try_block(rows, columns, kBandBytes)) {
      if (rows > 1)
        rows = even_piece(view.I, rows / 2);
      else if (columns > kMaxRows)
        columns = even_piece(view.J, columns / 2);
      else
        break;
    }
  }
  reads_neighbours = in_place && pixel == view.C;
  reads_taps = in_place && view.taps.size() > 1;
  samples = nominal_samples = 1;
  if (rows == view.I && columns == view.J) {
    nominal_samples = pixels / (rows * columns);
    if (band)
      nominal_samples = std::min(nominal_samples, kBandBytes / (band->size() * element_size));
    nominal_samples = std::max<int64_t>(1, nominal_samples);
    samples = even_piece(view.N, nominal_samples);
    // Of one panel a block of all samples would be the only task.
    const bool one_panel = view.groups == 1 && view.K * element_size <= kMaxVectors * kVectorBytes;
    if (one_panel && samples == view.N && view.N * view.pixels() >= kTilesEnough * kMaxRows)
      samples = ceil_div(view.N, 2);
  }
}

bool DirectPlan::packs_along(const ConvView& view, int64_t element_size) const {
  const int64_t pixels = view.N * view.pixels();
  const int64_t blocks =
      view.groups * ceil_div(view.N, samples) * ceil_div(view.I, rows) * ceil_div(view.J, columns);
  // The bands of all chunks wait for the panels. Weights of several times their size cost more to
  // write and read again than bands beyond the second-level cache.
  const int64_t bands = band ? chunks * samples * band->size() * element_size : 0;
  const int64_t weights = view.terms() * padded_filters * element_size;
  return view.terms() > 0 && pixels <= kPixelsPackedAlong &&
         bands <= std::max(kBandBytes, weights / kWeightsOfBands) &&
         (blocks == 1 || (blocks == 2 && pixels >= kPixelsForTwo));
}

bool direct_plan_cuts_pixels(const ConvView& view, int64_t element_size) {
  const int64_t panels = ceil_div(view.K * element_size, kMaxVectors * kVectorBytes);
  const int64_t alike = view.pixels() >= kPixelsForTwo ? kPanelsAlike : kPanelsAlikeFewPixels;
  // With two panels each of two threads would read all pixels, half of which the other one wrote.
  if (panels == 2) return view.N * view.groups == 1 && view.pixels() >= kPixelsForTwo;
  return view.N * view.groups % 2 == 1 && panels % 2 == 1 && panels < alike &&
         view.pixels() > kMaxRows;
}

}  // namespace torchconv::cpu
