// The table of algorithms for a view, each rule with the sizes from which it wins, and the switch.
#include "cpu/conv_choice.h"

#include <algorithm>
#include <atomic>

#include "cpu/band_gemm.h"
#include "cpu/channel_pairs.h"
#include "cpu/conv_band.h"
#include "cpu/conv_case.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_winograd.h"
#include "cpu/direct_gemm.h"
#include "cpu/group_gather.h"
#include "cpu/group_winograd.h"
#include "cpu/group_winograd_planes.h"
#include "cpu/inner_gather.h"
#include "cpu/microkernels/plane_taps.h"
#include "cpu/pair_wgrad.h"
#include "cpu/plane_pairs.h"
#include "cpu/plane_taps.h"
#include "cpu/sample_gemm.h"
#include "cpu/shared_taps.h"
#include "cpu/tap_runs.h"
#include "cpu/winograd.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

using Algorithm = ConvAlgorithm;

bool nchw(const ConvCase& c) { return c.v.src_pixels_contiguous(); }
// As are images of one pixel in either layout.
bool channels_last(const ConvCase& c) { return direct_gemm_applies(c.v); }

bool shared_taps_win(const ConvCase& c) {
  const bool pairs = c.is(DType::kBFloat16);
  return (c.is(DType::kFloat32) || pairs) && shared_taps_applies(c.v, pairs);
}

// Groups of several channels that lie side by side in vectors. Wider ones fill the vectors of the
// general products; but for NCHW images, see kGroupWidthPixels, and kernels of several taps, whose
// weights a product packs for other threads to read.
constexpr int64_t kGroupWidth = 16, kGroupWidthTaps = 40;
bool narrow_groups(const ConvCase& c, int64_t width) {
  return c.grouped() && c.v.C > 1 && c.wider_side() <= width &&
         group_band_applies(c.v, c.element_size());
}
bool group_tiles_win(const ConvCase& c) {
  return narrow_groups(c, nchw(c)        ? kGroupWidthPixels
                          : c.taps() > 1 ? kGroupWidthTaps
                                         : kGroupWidth);
}
bool group_tiles_win_wgrad(const ConvCase& c) { return narrow_groups(c, kGroupWidth); }

// Channels in a group from which Winograd's products repay their transforms, and the part of them
// that may be left by tiles along both axes, and along the rows.
constexpr int64_t kGroupRowsChannels = 4;
constexpr double kGroupSquareLeft = 0.54, kGroupRowsLeft = 0.75;
bool group_winograd_serves(const ConvCase& c) {
  return c.winograd && c.is(DType::kFloat32) && c.v.terms() > 0 &&
         c.narrower_side() >= kGroupRowsChannels && c.v.I > 1 && narrow_groups(c, kGroupWidth) &&
         group_winograd_applies(c.v);
}
bool group_winograd_wins(const ConvCase& c) {
  return group_winograd_serves(c) && group_winograd_products(c.v) <= kGroupSquareLeft;
}
bool group_winograd_wins_wgrad(const ConvCase& c) {
  return group_winograd_serves(c) && group_winograd_wgrad_products(c.v) <= kGroupRowsLeft;
}

// The part of the vectors along tiles that must have outputs for these to be faster than vectors
// along channels, of which an image in NCHW has to be transposed; and channels whose points stay in
// the first-level cache from rows to rows.
constexpr double kGroupPlanesLanes = 0.6;
constexpr int64_t kGroupPlanesChannels = 8;
bool group_planes_win(const ConvCase& c) {
  return group_winograd_wins(c) && group_planes_applies(c.v) &&
         (c.wider_side() <= kGroupPlanesChannels || group_planes_at_once(c.v)) &&
         group_planes_lanes_used(c.v) >= kGroupPlanesLanes;
}

// Of bfloat16, twice the multiplications of float.
bool multiplies_pairs(const ConvCase& c) {
  return c.is(DType::kBFloat16) && direct_gemm_by_pairs(c.v);
}
bool groups_by_pairs(const ConvCase& c) {
  return c.is(DType::kBFloat16) && c.grouped() && groups_take_pairs(c.v) &&
         narrow_groups(c, kGroupWidth);
}

// Winograd's transforms of the source are shared by all filters and those of the destination by all
// channels, so both sides must be wide. The weights of a sample alone are transformed for its
// pixels only: two tiles do not pay for that. Pairs of bfloat16 are multiplied where they lie, and
// their weights need not be widened first.
constexpr int64_t kWinogradChannels = 16;
constexpr int64_t kWinogradPixels = 33, kWinogradPixelsOverPairs = 65;
// A kernel of 5x5 has more to save, of less wide sides and smaller images.
constexpr int64_t kLargeWinogradChannels = 12, kLargeWinogradPixels = 16;
// How many times fewer multiplications pay for the transforms. Where few rows or columns are left
// for a tile, as with a dilation near the size of the image, there are hardly fewer. The direct
// product of pairs leaves the padding out, which the transforms of more channels outweigh.
constexpr double kWinogradSaving = 1.5, kWinogradSavingOverPairs = 3;
constexpr int64_t kWinogradFewChannels = 32;
bool winograd_has_work(const ConvCase& c) {
  const bool large = c.taps() > 9;
  const int64_t pixels = large                 ? kLargeWinogradPixels
                         : multiplies_pairs(c) ? kWinogradPixelsOverPairs
                                               : kWinogradPixels;
  return c.narrower_side() >= (large ? kLargeWinogradChannels : kWinogradChannels) &&
         c.v.pixels() >= pixels;
}
bool winograd_saves_enough(const ConvCase& c) {
  const bool pairs = multiplies_pairs(c) || groups_by_pairs(c);
  const double direct = pairs && c.narrower_side() <= kWinogradFewChannels
                            ? c.products_inside()
                            : static_cast<double>(c.v.pixels()) * static_cast<double>(c.taps());
  return direct >= (pairs ? kWinogradSavingOverPairs : kWinogradSaving) *
                       static_cast<double>(winograd_products(c.v));
}
bool winograd_wins(const ConvCase& c) {
  return c.winograd && winograd_has_work(c) && winograd_applies(c.v) && winograd_saves_enough(c);
}

// Of a stride, fewer taps, which share fewer of its pixels, do not repay the image's transposition
// into bands for few filters.
constexpr int64_t kManyStridedTaps = 25;
// Taps that are copied or transformed otherwise, and filters that leave no more of a vector empty
// than pixels along it would cost.
bool tap_runs_win(const ConvCase& c) {
  return c.is(DType::kFloat32) && tap_runs_applies(c.v) &&
         ((c.v.step_w > 1 && c.taps() < kManyStridedTaps) ||
          (c.taps() > 1 && 2 * c.v.K > kFewFilters));
}

// With fewer channels Winograd is along the rows only: so many filters in a whole vector or more,
// columns for several tiles. Long rows repay the transform of the source with few products already,
// but for a stride in NCHW, whose phases have to be taken apart.
constexpr int64_t kRowsFilters = 16, kRowsWidth = 12, kRowsProducts = 9 * 24;
// With a stride, or as many channels as have more weights to transform: longer rows, that save
// enough. Operands of so few channels stay in the first-level cache.
constexpr int64_t kRowsChannels = 32, kRowsLong = 24, kRowsFewChannels = 8;
constexpr double kRowsLeft = 0.7, kRowsLeftFewChannels = 0.8;
bool rows_have_products(const ConvCase& c) {
  if (c.taps() * c.v.K >= kRowsProducts) return true;
  return c.v.J >= kRowsLong && !(nchw(c) && c.v.step_w > 1);
}
bool rows_save_enough(const ConvCase& c) {
  if (c.v.step_w == 1 && c.v.C < kWinogradChannels) return true;
  return c.v.J >= kRowsLong && winograd_rows_products(c.v) <=
                                   (c.v.C <= kRowsFewChannels ? kRowsLeftFewChannels : kRowsLeft);
}
bool winograd_rows_win(const ConvCase& c) {
  return c.winograd && c.is(DType::kFloat32) && c.v.C <= kRowsChannels && c.v.K >= kRowsFilters &&
         c.v.J >= kRowsWidth && rows_have_products(c) && winograd_rows_applies(c.v) &&
         rows_save_enough(c);
}
// Filters up to which its transforms take longer than the products it saves, where more are left.
constexpr int64_t kRunsFilters = 64;
bool tap_runs_win_over_rows(const ConvCase& c) {
  return c.v.step_w > 1 && c.v.K <= kRunsFilters && tap_runs_win(c) &&
         winograd_rows_products(c.v) > kRowsLeft;
}

bool plane_pairs_win(const ConvCase& c) {
  return c.v.terms() > 0 && c.is(DType::kBFloat16) && plane_pairs_applies(c.v);
}

// Bands along pixels would take the phases apart for few filters: channels of an NCHW image whose
// rearrangement in pairs for these a stride repays.
constexpr int64_t kStridedPairsChannels = 16;
bool pairs_take_stride(const ConvCase& c) {
  return c.v.step_w > 1 && (!nchw(c) || c.v.C >= kStridedPairsChannels);
}
// A contiguous image is rearranged whole, which few filters, whose taps miss most of its pixels, do
// not repay.
bool pairs_read_image(const ConvCase& c) {
  return !nchw(c) || c.v.K >= kPatchFilters || c.taps() >= c.v.step_h * c.v.step_w;
}
// Whether a band along the pixels of a few filters has so many lanes between short rows that the
// direct product, whose filters leave most of a vector empty, has about as few vectors. Those of
// pairs have twice the terms, and are copied as they are.
constexpr double kDirectVectors = 1.2, kDirectVectorsOfPairs = 1.6;
bool band_leaves_lanes(const ConvCase& c) {
  const auto along = static_cast<double>(c.v.K * c.band_vectors());
  return static_cast<double>(c.v.pixels() * ceil_div(c.v.K, c.lanes())) <=
         (multiplies_pairs(c) ? kDirectVectorsOfPairs : kDirectVectors) * along;
}
bool direct_pairs_win(const ConvCase& c) {
  return c.v.terms() > 0 && multiplies_pairs(c) && pairs_read_image(c) &&
         (c.v.K > kFewFilters || pairs_take_stride(c) || band_leaves_lanes(c));
}

// Terms of a sample's inner products that are summed for less than the weights are packed for.
constexpr int64_t kSampleTerms = 96;
bool sample_product_wins(const ConvCase& c) {
  return sample_gemm_applies(c.v) && (c.v.weight_c != 1 || c.v.C >= kSampleTerms);
}

bool depthwise_winograd_wins(const ConvCase& c) {
  return c.winograd && c.is(DType::kFloat32) && depthwise_winograd_applies(c.v);
}
bool depthwise_columns_win(const ConvCase& c) {
  if (c.is(DType::kFloat64)) return depthwise_columns_applies<double>(c.v);
  if (c.is(DType::kBFloat16)) return depthwise_columns_applies<BFloat16>(c.v);
  return c.is(DType::kFloat16) ? depthwise_columns_applies<Float16>(c.v)
                               : depthwise_columns_applies<float>(c.v);
}
bool depthwise_columns_win_wgrad(const ConvCase& c) {
  return c.is(DType::kFloat64) ? depthwise_columns_square_applies<double>(c.v)
                               : depthwise_columns_square_applies<float>(c.v);
}
bool depthwise_channels_win(const ConvCase& c) {
  return c.is(DType::kFloat64) ? depthwise_channels_applies<double>(c.v)
                               : depthwise_channels_applies<float>(c.v);
}
bool planes_winograd_wins(const ConvCase& c) {
  return c.winograd && c.is(DType::kFloat32) && c.grouped() &&
         depthwise_planes_winograd_applies(c.v);
}
bool depthwise_planes_win(const ConvCase& c) {
  return c.grouped() && depthwise_planes_applies(c.v);
}
bool depthwise_planes_win_wgrad(const ConvCase& c) {
  return c.grouped() && depthwise_planes_wgrad_applies(c.v);
}

// Filters up to which tiles along the pixels of planes read these for each other, terms that repay
// a tile, and its sums, of which fewer would wait for each other; and the part of the lanes of a
// row that must have outputs.
constexpr int64_t kPlaneFiltersMost = 2 * kPlaneFilters, kPlaneTerms = 24, kPlaneSumsLeast = 8;
constexpr double kPlaneLanes = 0.75;
bool plane_taps_win(const ConvCase& c) {
  if (!c.is(DType::kFloat32) || c.v.K > kPlaneFiltersMost || c.taps() == 1 ||
      c.v.terms() < kPlaneTerms || !plane_taps_applies(c.v))
    return false;
  const int64_t vectors = ceil_div(c.v.J, c.lanes());
  const int64_t filters = ceil_div(c.v.K, ceil_div(c.v.K, int64_t{kPlaneFilters}));
  return filters * std::min<int64_t>(vectors, plane_vectors(filters)) >= kPlaneSumsLeast &&
         static_cast<double>(c.v.J) >= kPlaneLanes * static_cast<double>(vectors * c.lanes());
}

// Pixels of a row that are enough rows of the band product's register tile, and terms that repay
// the transposition of its sums. Wide groups whose last vector of filters is not mostly empty.
constexpr int64_t kBandProductWidth = 4, kBandProductTerms = 24;
bool band_product_wins(const ConvCase& c) {
  return nchw(c) && c.taps() > 1 && c.v.J >= kBandProductWidth &&
         c.v.terms() >= kBandProductTerms && c.wider_side() > kNarrow &&
         4 * c.v.K >= 3 * round_up(c.v.K, c.lanes()) && band_gemm_applies(c.v, c.element_size());
}

bool band_fits(const ConvCase& c, bool along_pixels) {
  return BandExtent(c.v, along_pixels, c.element_size(), c.lanes()).fits;
}
bool pieces_fit(const ConvCase& c) {
  return band_fits(c, true) || BandExtent(column_pieces(c.v, c.element_size(), c.lanes())[0], true,
                                          c.element_size(), c.lanes())
                                   .fits;
}
bool group_pixels_win(const ConvCase& c) {
  return c.grouped() && nchw(c) && c.wider_side() <= kNarrow && band_fits(c, true);
}
bool group_channels_win(const ConvCase& c) {
  return c.grouped() && !nchw(c) && c.wider_side() <= kNarrow && band_fits(c, false);
}
// In channels_last few filters have vectors along pixels from so many taps on.
constexpr int64_t kManyTaps = 6;
bool few_filters_win(const ConvCase& c) {
  return !c.grouped() && channels_last(c) && c.v.K <= kFewFilters && c.taps() >= kManyTaps &&
         band_fits(c, true) && !band_leaves_lanes(c);
}
// One tap for each pixel of a plane, which nothing need copy.
bool reads_pixels_in_place(const ConvCase& c) {
  return nchw(c) && c.taps() == 1 && c.v.pixels() == c.v.H * c.v.W && c.v.step_h == 1 &&
         c.v.step_w == 1;
}
// Several taps share a band of the source, which a single one would only copy. Below this width the
// columns that a band adds to a row cost more than packing.
constexpr int64_t kBandWidth = 9;
bool taps_share_a_band(const ConvCase& c) {
  return c.taps() > 1 && c.v.step_w == 1 && c.v.J >= kBandWidth;
}
bool band_wins(const ConvCase& c) {
  return !c.grouped() && !reads_pixels_in_place(c) &&
         (taps_share_a_band(c) || c.narrower_side() <= kNarrow) && pieces_fit(c);
}

// Of one tap, channels for each filter whose products repay the sum over the lanes, where filters
// are more than so few; and the part of the lanes that must hold a term.
constexpr int64_t kInnerChannels = 8, kInnerFiltersFew = 3;
constexpr double kLanesUsed = 0.7;
// Few channels for each filter are sums over the lanes for few products: vectors along pixels, of a
// band that the filters share, then have less to do.
bool filters_share_band(const ConvCase& c) {
  return c.is(DType::kFloat32) && c.v.C < 2 * c.v.K && few_filters_win(c);
}
bool inner_product_wins(const ConvCase& c) {
  return c.v.K <= kInnerFiltersMost && !is_half(c.dtype) && inner_gather_applies(c.v) &&
         !filters_share_band(c) &&
         (c.taps() > 1 || c.v.K <= kInnerFiltersFew || c.v.C >= kInnerChannels * c.v.K) &&
         inner_gather_lanes_used(c.v, c.lanes()) >= kLanesUsed;
}

// Fewer channels or filters, or a smaller C x K, leave the transforms of the weight gradient too
// few products to serve. Nor do few pixels, or any of a strided image, serve those of many groups'
// gradients.
constexpr int64_t kWinogradWgradChannels = 16, kWinogradWgradProduct = 256,
                  kWinogradWgradGroupPixels = 64;
// A stride's tiles have 81 products to transform back, which few pixels of a batch do not pay for.
constexpr int64_t kStridedWgradPixels = 128;
constexpr int64_t kStridedWgradProduct = 512, kStridedWgradProductDouble = 2048,
                  kStridedWgradProductGroup = 4096;
// A 5x5 kernel has 25 taps to transform back, which few pixels of few channels do not pay for.
constexpr int64_t kLargeWgradChannels = 8, kLargeWgradPixels = 36, kLargeWgradWork = 25000;
// But for a first layer: a 7x7 kernel has products enough with any channels, a 3x3 kernel with
// stride 1 from so many channels and filters on. With fewer channels the transforms of dz take
// longer than its products with all taps.
constexpr int64_t kFirstLayerChannels = 5, kFirstLayerFilters = 32;
bool winograd_wgrad_has_work(const ConvCase& c) {
  const ConvView& v = c.v;
  if (c.taps() == 25)
    return c.narrower_side() >= kLargeWgradChannels && c.wider_side() > kNarrow &&
           v.pixels() >= kLargeWgradPixels && v.pixels() * v.C * v.K >= kLargeWgradWork;
  if (c.narrower_side() >= kWinogradWgradChannels) {
    if (v.step_h == 1)
      return v.C * v.K >= kWinogradWgradProduct &&
             (!c.grouped() || v.N * v.pixels() >= kWinogradWgradGroupPixels);
    return v.N * v.pixels() >= kStridedWgradPixels &&
           v.C * v.K >= (c.grouped()             ? kStridedWgradProductGroup
                         : c.is(DType::kFloat64) ? kStridedWgradProductDouble
                                                 : kStridedWgradProduct);
  }
  if (c.taps() > 9) return v.K >= kWinogradWgradChannels;
  return v.step_h == 1 && v.C >= kFirstLayerChannels && v.K >= kFirstLayerFilters;
}
bool winograd_wins_wgrad(const ConvCase& c) {
  return c.winograd && winograd_wgrad_has_work(c) && winograd_wgrad_applies(c.v);
}

bool pairs_win_wgrad(const ConvCase& c) {
  return c.is(DType::kBFloat16) && pair_wgrad_applies(c.v);
}
bool pairs_win_wgrad_over_winograd(const ConvCase& c) {
  return pairs_win_wgrad(c) &&
         (c.v.step_h > 1 || c.grouped() || c.narrower_side() < kWinogradWgradChannels);
}

// Rows from which vectors along them serve so few filters, and half of them, better than products
// over pixels do that many channels share.
constexpr int64_t kLongRow = 16, kShortRow = 9;
// Too few channels on both sides for vectors along them, or filters where they are not innermost.
bool wgrad_narrow(const ConvCase& c) {
  if (nchw(c) && !c.grouped() && c.taps() > 1)
    return c.v.K <= kNarrow &&
           (c.v.C <= kNarrow || c.v.J >= (c.v.K > kNarrow / 2 ? kLongRow : kShortRow));
  return c.wider_side() <= kNarrow && (nchw(c) || !c.grouped());
}
bool band_wins_wgrad(const ConvCase& c) { return wgrad_narrow(c) && band_fits(c, true); }

struct Rule {
  ConvAlgorithm algorithm;
  bool (*applies)(const ConvCase& c);
};

constexpr Rule kGatherRules[] = {
    {Algorithm::kSharedTaps, shared_taps_win},
    {Algorithm::kGroupPlanes, group_planes_win},
    {Algorithm::kGroupWinograd, group_winograd_wins},
    {Algorithm::kWinograd, winograd_wins},
    {Algorithm::kTapRuns, tap_runs_win_over_rows},
    {Algorithm::kWinogradRows, winograd_rows_win},
    {Algorithm::kTapRuns, tap_runs_win},
    {Algorithm::kDirectProduct,
     [](const ConvCase& c) { return c.v.terms() == 0 && channels_last(c); }},
    {Algorithm::kPlanePairs, plane_pairs_win},
    {Algorithm::kDirectProduct, direct_pairs_win},
    {Algorithm::kPixelProduct, [](const ConvCase& c) { return c.v.terms() == 0; }},
    {Algorithm::kSampleProduct, sample_product_wins},
    {Algorithm::kDepthwiseWinograd, depthwise_winograd_wins},
    {Algorithm::kDepthwiseColumns, depthwise_columns_win},
    {Algorithm::kDepthwiseChannels, depthwise_channels_win},
    {Algorithm::kPlanesWinograd, planes_winograd_wins},
    {Algorithm::kDepthwisePlanes, depthwise_planes_win},
    {Algorithm::kGroupTiles, group_tiles_win},
    {Algorithm::kPlaneTaps, plane_taps_win},
    {Algorithm::kBandProduct, band_product_wins},
    {Algorithm::kBandAlongPixels, group_pixels_win},
    {Algorithm::kBandAlongChannels, group_channels_win},
    {Algorithm::kInnerProduct, inner_product_wins},
    {Algorithm::kBandAlongPixels, few_filters_win},
    {Algorithm::kDirectProduct, channels_last},
    {Algorithm::kBandAlongPixels, band_wins},
    {Algorithm::kPixelProduct, [](const ConvCase&) { return true; }},
};

constexpr Rule kWgradRules[] = {
    {Algorithm::kDepthwiseColumns, depthwise_columns_win_wgrad},
    {Algorithm::kDepthwiseChannels, depthwise_channels_win},
    {Algorithm::kDepthwisePlanes, depthwise_planes_win_wgrad},
    {Algorithm::kPairWgrad, pairs_win_wgrad_over_winograd},
    {Algorithm::kWinograd, winograd_wins_wgrad},
    {Algorithm::kGroupWinograd, group_winograd_wins_wgrad},
    {Algorithm::kGroupTiles, group_tiles_win_wgrad},
    {Algorithm::kBandAlongPixels, band_wins_wgrad},
    {Algorithm::kBandAlongChannels, group_channels_win},
    {Algorithm::kPairWgrad, pairs_win_wgrad},
    {Algorithm::kWgradProduct, [](const ConvCase&) { return true; }},
};

template <size_t kCount>
ConvAlgorithm first_that_applies(const Rule (&rules)[kCount], const ConvCase& c) {
  return std::find_if(rules, rules + kCount - 1, [&](const Rule& r) { return r.applies(c); })
      ->algorithm;
}

// Winograd's algorithm is allowed after an even number of them.
std::atomic<int64_t> switched{0};

}  // namespace

void allow_winograd(bool allowed) {
  int64_t changes = switched;
  while ((changes % 2 == 0) != allowed && !switched.compare_exchange_weak(changes, changes + 1)) {
  }
}
bool winograd_allowed() { return winograd_changes() % 2 == 0; }
int64_t winograd_changes() { return switched; }

ConvAlgorithm gather_algorithm(const ConvView& view, DType dtype, bool winograd) {
  return first_that_applies(kGatherRules, {view, dtype, winograd});
}

ConvAlgorithm wgrad_algorithm(const ConvView& view, DType dtype, bool winograd) {
  return first_that_applies(kWgradRules, {view, dtype, winograd});
}

}  // namespace torchconv::cpu
