// The table of algorithms, the sizes from which each wins, and the switch.
#include "cpu/conv_choice.h"

#include <algorithm>
#include <atomic>

#include "cpu/band_gemm.h"
#include "cpu/channel_pairs.h"
#include "cpu/channel_repeat.h"
#include "cpu/channels_last_copy.h"
#include "cpu/col2im.h"
#include "cpu/conv_band.h"
#include "cpu/depthwise_channels.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_phases.h"
#include "cpu/depthwise_planes.h"
#include "cpu/depthwise_winograd.h"
#include "cpu/direct_gemm.h"
#include "cpu/group_gather.h"
#include "cpu/group_winograd.h"
#include "cpu/group_winograd_planes.h"
#include "cpu/inner_gather.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/pair_wgrad.h"
#include "cpu/patches.h"
#include "cpu/plane_pairs.h"
#include "cpu/sample_gemm.h"
#include "cpu/shared_taps.h"
#include "cpu/tap_runs.h"
#include "cpu/winograd.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_strided.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

// Winograd's transforms of the source are shared by all filters and those of the destination by all
// channels, so both sides must be wide.
constexpr int64_t kWinogradChannels = 16, kWinogradFewChannels = 32;
// With fewer channels it is along the rows only: so many filters in a whole vector or more, columns
// for several tiles. Long rows repay the transform of the source with few products already, but for
// a stride in NCHW, whose phases have to be taken apart.
constexpr int64_t kRowsFilters = 16, kRowsWidth = 12, kRowsProducts = 9 * 24;
// With a stride, or as many channels as have more weights to transform: longer rows, that save
// enough. Operands of so few channels stay in the first-level cache.
constexpr int64_t kRowsChannels = 32, kRowsLong = 24, kRowsFewChannels = 8;
constexpr double kRowsLeft = 0.7, kRowsLeftFewChannels = 0.8;
// Filters up to which its transforms take longer than the products it saves, where more are left.
constexpr int64_t kRunsFilters = 64;
// The weights of a sample alone are transformed for its pixels only. Two tiles do not pay for that.
constexpr int64_t kWinogradPixels = 33;
// Pairs of bfloat16 are multiplied where they lie, and their weights need not be widened first.
constexpr int64_t kWinogradPixelsOverPairs = 65;
// A kernel of 5x5 has more to save, of less wide sides and smaller images.
constexpr int64_t kLargeWinogradChannels = 12, kLargeWinogradPixels = 16;
// The same for a stride of 2. The direct algorithm packs the weights too, and dgrad's does so once
// for each residue; in channels_last fprop's has least to pack.
constexpr int64_t kStridedChannels = 16;
constexpr int64_t kStridedPixels = 4, kStridedPixelsChannelsLast = 26;
constexpr double kStridedSaving = 1.4, kStridedSavingDgrad = 1.1;
// How many times fewer multiplications pay for the transforms. Where few rows or columns are left
// for a tile, as with a dilation near the size of the image, there are hardly fewer.
constexpr double kWinogradSaving = 1.5, kWinogradSavingOverPairs = 3;
// Fewer channels or filters, or a smaller C x K, leave the transforms of the weight gradient too
// few products to serve.
constexpr int64_t kWinogradWgradChannels = 16, kWinogradWgradProduct = 256;
// Nor do few pixels, or any of a strided image, serve those of many groups' gradients.
constexpr int64_t kWinogradWgradGroupPixels = 64;
constexpr int64_t kStridedWgradProduct = 512, kStridedWgradProductDouble = 2048,
                  kStridedWgradProductGroup = 4096;
// A stride's tiles have 81 products to transform back, which few pixels of a batch do not pay for.
constexpr int64_t kStridedWgradPixels = 128;
// A 5x5 kernel has 25 taps to transform back, which few pixels of few channels do not pay for.
constexpr int64_t kLargeWgradChannels = 8, kLargeWgradPixels = 36, kLargeWgradWork = 25000;
// But for a first layer: a 7x7 kernel has products enough with any channels, a 3x3 kernel with
// stride 1 from so many channels and filters on. With fewer channels the transforms of dz take
// longer than its products with all taps.
constexpr int64_t kFirstLayerChannels = 5, kFirstLayerFilters = 32;
// A side this narrow would use a fraction of a register tile of the products.
constexpr int64_t kNarrow = 8;
// Rows from which vectors along them serve so few filters, and half of them, better than products
// over pixels do that many channels share.
constexpr int64_t kLongRow = 16, kShortRow = 9;
// So would filters that fill at most half a vector: vectors then run along pixels in either layout,
// where as many taps share the transposed source.
constexpr int64_t kFewFilters = kVectorBytes / 8, kManyTaps = 6;
// The same with a stride, whose taps share fewer of its pixels.
constexpr int64_t kManyStridedTaps = 25;
// Beside so many vectors of the direct product, of which those of pairs have twice the terms, and
// are copied as they are.
constexpr double kDirectVectors = 1.2, kDirectVectorsOfPairs = 1.6;
// What an inner product takes beside a sum along pixels, with the sum of its lanes, and what a
// copy in channels_last takes of an element, as a part of a vector's product.
constexpr double kInnerVectors = 1.2, kCopyVectors = 0.4;
// Of a row of outputs through a tap: products of short rows in bands along filters, times their
// length, and packing along pixels beside products of so many filters, that take as long as an
// element's copy, which another core may have to read; and what the copy of a result takes of that.
constexpr double kBandRowCopies = 2, kPixelRowCopies = 85, kPackingFilters = 160,
                 kResultCopies = 0.5;
// Terms that repay the calls, and the part of them that must lie inside the image.
constexpr int64_t kCopiedTerms = 192;
constexpr double kCopiedInside = 0.85;
// Products of a pixel with a filter's weight gradients that repay its copy.
constexpr double kWgradCopies = 4.5;
// Channels of an NCHW image whose rearrangement in pairs for so few filters a stride repays.
constexpr int64_t kStridedPairsChannels = 16;
// Filters so few that the lanes of the inner products are summed for less than the lanes that
// filters would leave empty, and the part of the inner products' lanes that must hold a term.
constexpr int64_t kInnerFiltersMost = 8;
constexpr double kLanesUsed = 0.7;
// Of one tap, channels for each filter whose products repay the sum over the lanes, where filters
// are more than so few.
constexpr int64_t kInnerChannels = 8, kInnerFiltersFew = 3;
// Terms of a sample's inner products that are summed for less than the weights are packed for.
constexpr int64_t kSampleTerms = 96;
// Filters whose products repay the rearrangement of the image.
constexpr int64_t kPatchFilters = 32;
// Patches of several taps are copied by rows of outputs: shorter ones cost more than the product's
// own copy.
constexpr int64_t kPatchColumns = 4;
// Those from which the weight gradient reads a strided image several times, see conv_wgrad.cpp.
constexpr int64_t kPatchFiltersWgrad = 512;
// Products that each element of dx's columns leaves out, from which these pay for their fold; and
// the columns of a sample that memory is taken for.
constexpr double kFoldProducts = 34;
constexpr double kMostColumnBytes = 32 << 20;
// In NCHW bands of rows leave out most of these products too, and such a direct product takes the
// weights apart: as long as for the products of so many pixels. Fewer filters do not pay for the
// fold of planes.
constexpr int64_t kColumnPixels = 48, kColumnFilters = 128;
// Columns of pairs (column_pairs.h) pack the weights of a channel for few rows where there are few
// taps, and for few columns where there are few pixels.
constexpr int64_t kColumnPairTaps = 28, kColumnPairPixels = 24;
// Wider groups fill the vectors of the general products; but for NCHW images, of which they have
// to rearrange more, the phases of a stride, which the tiles pack and compute together, and kernels
// of several taps, whose weights a product packs for other threads to read. Phases of larger
// strides are not computed together.
constexpr int64_t kGroupWidth = 16, kGroupWidthTaps = 40, kGroupWidthPixels = 64, kGroupStride = 4;
// Channels in a group from which Winograd's products repay their transforms, and the part of them
// that may be left by tiles along both axes, and along the rows.
constexpr int64_t kGroupRowsChannels = 4;
constexpr double kGroupSquareLeft = 0.54, kGroupRowsLeft = 0.75;
// The part of the vectors along tiles that must have outputs for these to be faster than vectors
// along channels, of which an image in NCHW has to be transposed; and channels whose points stay in
// the first-level cache from rows to rows.
constexpr double kGroupPlanesLanes = 0.6;
constexpr int64_t kGroupPlanesChannels = 8;
// Below this width the columns that a band adds to a row cost more than packing.
constexpr int64_t kBandWidth = 9;

// Terms that repay the transposition of the band product's sums.
constexpr int64_t kBandProductTerms = 24;
// Pixels of a row that are enough rows of its register tile.
constexpr int64_t kBandProductWidth = 4;

// What the rules ask for.
struct Case {
  const ConvView& v;
  const DType dtype;
  const bool winograd;

  bool is(DType t) const { return dtype == t; }
  int64_t narrower_side() const { return std::min(v.C, v.K); }
  int64_t wider_side() const { return std::max(v.C, v.K); }
  bool grouped() const { return v.groups > 1; }
  bool nchw() const { return v.src_pixels_contiguous(); }
  // As are images of one pixel in either layout.
  bool channels_last() const { return direct_gemm_applies(v); }
  bool depthwise_columns() const {
    if (is(DType::kFloat64)) return depthwise_columns_applies<double>(v);
    if (is(DType::kBFloat16)) return depthwise_columns_applies<BFloat16>(v);
    return is(DType::kFloat16) ? depthwise_columns_applies<Float16>(v)
                               : depthwise_columns_applies<float>(v);
  }
  bool depthwise_columns_square() const {
    return is(DType::kFloat64) ? depthwise_columns_square_applies<double>(v)
                               : depthwise_columns_square_applies<float>(v);
  }
  // Twice the multiplications of float.
  bool by_pairs() const { return is(DType::kBFloat16) && direct_gemm_by_pairs(v); }
  // Bands along pixels would take the phases apart for few filters.
  bool pairs_take_stride() const {
    return v.step_w > 1 && (!nchw() || v.C >= kStridedPairsChannels);
  }
  // A contiguous image is rearranged whole, which few filters, whose taps miss most of its pixels,
  // do not repay.
  bool pairs_read_image() const {
    return !nchw() || v.K >= kPatchFilters ||
           static_cast<int64_t>(v.taps.size()) >= v.step_h * v.step_w;
  }
  bool groups_by_pairs() const {
    return is(DType::kBFloat16) && grouped() && groups_take_pairs(v) && narrow_groups();
  }
  bool wgrad_by_pairs() const { return is(DType::kBFloat16) && pair_wgrad_applies(v); }
  bool depthwise() const {
    return is(DType::kFloat64) ? depthwise_channels_applies<double>(v)
                               : depthwise_channels_applies<float>(v);
  }
  bool band_fits(bool along_pixels) const {
    const int64_t size = element_size();
    return BandExtent(v, along_pixels, size, kVectorBytes / size).fits;
  }
  bool pieces_fit() const {
    const int64_t size = element_size(), lanes = kVectorBytes / size;
    return band_fits(true) || BandExtent(column_pieces(v, size, lanes)[0], true, size, lanes).fits;
  }
  // Of a filter's sums along the pixels of a band.
  int64_t band_vectors() const {
    const int64_t size = element_size(), lanes = kVectorBytes / size;
    return ceil_div((v.I - 1) * BandExtent(v, true, size, lanes).width + v.J, lanes);
  }
  // Whether a band along the pixels of a few filters has so many lanes between short rows that the
  // direct product, whose filters leave most of a vector empty, has about as few vectors.
  bool band_leaves_lanes() const {
    const auto along = static_cast<double>(v.K * band_vectors());
    const int64_t lanes = kVectorBytes / element_size();
    return static_cast<double>(v.pixels() * ceil_div(v.K, lanes)) <=
           (by_pairs() ? kDirectVectorsOfPairs : kDirectVectors) * along;
  }
  bool half() const { return is(DType::kBFloat16) || is(DType::kFloat16); }
  double lanes_used() const { return inner_gather_lanes_used(v, kVectorBytes / element_size()); }
  // Groups of several channels that lie side by side in vectors.
  bool narrow_groups(int64_t width = kGroupWidth) const {
    return grouped() && v.C > 1 && wider_side() <= width && group_band_applies(v, element_size());
  }
  // Of the type that is computed in.
  int64_t element_size() const { return is(DType::kFloat64) ? sizeof(double) : sizeof(float); }
  // Wide groups whose last vector of filters is not mostly empty.
  bool filters_fill_vectors() const {
    return wider_side() > kNarrow && 4 * v.K >= 3 * round_up(v.K, kVectorBytes / element_size());
  }
  bool feeds_group_winograd() const {
    return winograd && is(DType::kFloat32) && v.terms() > 0 &&
           narrower_side() >= kGroupRowsChannels && v.I > 1 && narrow_groups();
  }
  bool feeds_winograd() const {
    const bool large = v.taps.size() > 9;
    const int64_t pixels = large        ? kLargeWinogradPixels
                           : by_pairs() ? kWinogradPixelsOverPairs
                                        : kWinogradPixels;
    return narrower_side() >= (large ? kLargeWinogradChannels : kWinogradChannels) &&
           v.pixels() >= pixels;
  }
  // Products of taps that reach the image.
  double products_inside() const {
    double inside = 0;
    for (const ConvTap& tap : v.taps)
      inside += static_cast<double>(valid_range(v.I, v.step_h, tap.h, v.H).size()) *
                static_cast<double>(valid_range(v.J, v.step_w, tap.w, v.W).size());
    return inside;
  }
  bool winograd_saves_enough() const {
    const bool pairs = by_pairs() || groups_by_pairs();
    // The direct product of pairs leaves the padding out, which the transforms of more channels
    // outweigh.
    const double direct =
        pairs && narrower_side() <= kWinogradFewChannels
            ? products_inside()
            : static_cast<double>(v.pixels()) * static_cast<double>(v.taps.size());
    return direct >= (pairs ? kWinogradSavingOverPairs : kWinogradSaving) *
                         static_cast<double>(winograd_products(v));
  }
  bool rows_have_products() const {
    if (static_cast<int64_t>(v.taps.size()) * v.K >= kRowsProducts) return true;
    return v.J >= kRowsLong && !(nchw() && v.step_w > 1);
  }
  bool rows_save_enough() const {
    if (v.step_w == 1 && v.C < kWinogradChannels) return true;
    return v.J >= kRowsLong && winograd_rows_products(v) <=
                                   (v.C <= kRowsFewChannels ? kRowsLeftFewChannels : kRowsLeft);
  }
  // Taps that are copied or transformed otherwise, and filters that leave no more of a vector empty
  // than pixels along it would cost. Few taps of a stride do not repay the image's transposition.
  bool feeds_tap_runs() const {
    const auto taps = static_cast<int64_t>(v.taps.size());
    return is(DType::kFloat32) && tap_runs_applies(v) &&
           ((v.step_w > 1 && taps < kManyStridedTaps) || (taps > 1 && 2 * v.K > kFewFilters));
  }
  bool feeds_winograd_wgrad() const {
    if (v.taps.size() == 25)
      return narrower_side() >= kLargeWgradChannels && wider_side() > kNarrow &&
             v.pixels() >= kLargeWgradPixels && v.pixels() * v.C * v.K >= kLargeWgradWork;
    if (narrower_side() >= kWinogradWgradChannels) {
      if (v.step_h == 1)
        return v.C * v.K >= kWinogradWgradProduct &&
               (!grouped() || v.N * v.pixels() >= kWinogradWgradGroupPixels);
      return v.N * v.pixels() >= kStridedWgradPixels &&
             v.C * v.K >= (grouped()             ? kStridedWgradProductGroup
                           : is(DType::kFloat64) ? kStridedWgradProductDouble
                                                 : kStridedWgradProduct);
    }
    if (v.taps.size() > 9) return v.K >= kWinogradWgradChannels;
    return v.step_h == 1 && v.C >= kFirstLayerChannels && v.K >= kFirstLayerFilters;
  }
  // Too few channels on both sides for vectors along them, or filters where they are not innermost.
  bool wgrad_narrow() const {
    if (nchw() && !grouped() && v.taps.size() > 1)
      return v.K <= kNarrow &&
             (v.C <= kNarrow || v.J >= (v.K > kNarrow / 2 ? kLongRow : kShortRow));
    return wider_side() <= kNarrow && (nchw() || !grouped());
  }
  // One tap for each pixel of a plane, which nothing need copy.
  bool reads_pixels_in_place() const {
    return nchw() && v.taps.size() == 1 && v.pixels() == v.H * v.W && v.step_h == 1 &&
           v.step_w == 1;
  }
  // Whether the inner products of a copy in channels_last take less than bands along the pixels.
  bool inner_products_repay_copies() const {
    const int64_t lanes = kVectorBytes / element_size();
    const double filters = static_cast<double>(v.K * static_cast<int64_t>(v.taps.size()));
    const double saved =
        filters * (static_cast<double>(band_vectors()) -
                   kInnerVectors * static_cast<double>(v.pixels()) / static_cast<double>(lanes));
    return v.K <= kInnerFiltersMost && v.C % lanes == 0 &&
           saved >= kCopyVectors * (static_cast<double>(v.H * v.W) + filters);
  }
  // The same of the direct product and what `algorithm` does for each row of a tap.
  bool direct_product_repays_copies(ConvAlgorithm algorithm) const {
    const auto taps = static_cast<int64_t>(v.taps.size());
    const auto rows = static_cast<double>(taps * v.I), K = static_cast<double>(v.K);
    const double copied = static_cast<double>(v.H * v.W) + kResultCopies * K *
                                                               static_cast<double>(v.pixels()) /
                                                               static_cast<double>(v.C);
    if (taps < 2 || v.terms() < kCopiedTerms) return false;
    // Bands leave most of the padding out.
    if (algorithm == ConvAlgorithm::kBandProduct)
      return rows * K >= kBandRowCopies * static_cast<double>(v.J) * copied &&
             products_inside() >= kCopiedInside * static_cast<double>(v.pixels() * taps);
    return algorithm == ConvAlgorithm::kPixelProduct &&
           rows * (kPackingFilters + K) >= kPixelRowCopies * copied;
  }
  // Several taps share a band of the source, which a single one would only copy.
  bool taps_share_a_band() const { return v.taps.size() > 1 && v.step_w == 1 && v.J >= kBandWidth; }
};

struct Rule {
  ConvAlgorithm algorithm;
  bool (*applies)(const Case& c);
};

using Algorithm = ConvAlgorithm;

// clang-format off
constexpr Rule kGatherRules[] = {
    {Algorithm::kSharedTaps, [](const Case& c) {
       return (c.is(DType::kFloat32) || c.is(DType::kBFloat16)) &&
              shared_taps_applies(c.v, c.is(DType::kBFloat16));
     }},
    {Algorithm::kGroupPlanes, [](const Case& c) {
       return c.feeds_group_winograd() && group_winograd_applies(c.v) &&
              group_winograd_products(c.v) <= kGroupSquareLeft && group_planes_applies(c.v) &&
              (c.wider_side() <= kGroupPlanesChannels || group_planes_at_once(c.v)) &&
              group_planes_lanes_used(c.v) >= kGroupPlanesLanes;
     }},
    {Algorithm::kGroupWinograd, [](const Case& c) {
       return c.feeds_group_winograd() && group_winograd_applies(c.v) &&
              group_winograd_products(c.v) <= kGroupSquareLeft;
     }},
    {Algorithm::kWinograd, [](const Case& c) {
       return c.winograd && c.feeds_winograd() && winograd_applies(c.v) &&
              c.winograd_saves_enough();
     }},
    {Algorithm::kTapRuns, [](const Case& c) {
       return c.v.step_w > 1 && c.v.K <= kRunsFilters && c.feeds_tap_runs() &&
              winograd_rows_products(c.v) > kRowsLeft;
     }},
    {Algorithm::kWinogradRows, [](const Case& c) {
       return c.winograd && c.is(DType::kFloat32) && c.v.C <= kRowsChannels &&
              c.v.K >= kRowsFilters && c.v.J >= kRowsWidth && c.rows_have_products() &&
              winograd_rows_applies(c.v) && c.rows_save_enough();
     }},
    {Algorithm::kTapRuns, [](const Case& c) { return c.feeds_tap_runs(); }},
    {Algorithm::kDirectProduct, [](const Case& c) {
       return c.v.terms() == 0 && c.channels_last();
     }},
    {Algorithm::kPlanePairs, [](const Case& c) {
       return c.v.terms() > 0 && c.is(DType::kBFloat16) && plane_pairs_applies(c.v);
     }},
    {Algorithm::kDirectProduct, [](const Case& c) {
       return c.v.terms() > 0 && c.by_pairs() && c.pairs_read_image() &&
              (c.v.K > kFewFilters || c.pairs_take_stride() ||
               c.band_leaves_lanes());
     }},
    {Algorithm::kPixelProduct, [](const Case& c) { return c.v.terms() == 0; }},
    {Algorithm::kSampleProduct, [](const Case& c) {
       return sample_gemm_applies(c.v) && (c.v.weight_c != 1 || c.v.C >= kSampleTerms);
     }},
    {Algorithm::kDepthwiseWinograd, [](const Case& c) {
       return c.winograd && c.is(DType::kFloat32) && depthwise_winograd_applies(c.v);
     }},
    {Algorithm::kDepthwiseColumns, [](const Case& c) { return c.depthwise_columns(); }},
    {Algorithm::kDepthwiseChannels, [](const Case& c) { return c.depthwise(); }},
    {Algorithm::kPlanesWinograd, [](const Case& c) {
       return c.winograd && c.is(DType::kFloat32) && c.grouped() &&
              depthwise_planes_winograd_applies(c.v);
     }},
    {Algorithm::kDepthwisePlanes, [](const Case& c) {
       return c.grouped() && depthwise_planes_applies(c.v);
     }},
    {Algorithm::kGroupTiles, [](const Case& c) {
       return c.narrow_groups(c.nchw()               ? kGroupWidthPixels
                              : c.v.taps.size() > 1 ? kGroupWidthTaps
                                                    : kGroupWidth);
     }},
    {Algorithm::kBandProduct, [](const Case& c) {
       return c.nchw() && c.v.taps.size() > 1 && c.v.J >= kBandProductWidth &&
              c.v.terms() >= kBandProductTerms && c.filters_fill_vectors() &&
              band_gemm_applies(c.v, c.element_size());
     }},
    {Algorithm::kBandAlongPixels, [](const Case& c) {
       return c.grouped() && c.nchw() && c.wider_side() <= kNarrow && c.band_fits(true);
     }},
    {Algorithm::kBandAlongChannels, [](const Case& c) {
       return c.grouped() && !c.nchw() && c.wider_side() <= kNarrow && c.band_fits(false);
     }},
    {Algorithm::kInnerProduct, [](const Case& c) {
       return c.v.K <= kInnerFiltersMost && !c.half() && inner_gather_applies(c.v) &&
              (c.v.taps.size() > 1 || c.v.K <= kInnerFiltersFew ||
               c.v.C >= kInnerChannels * c.v.K) &&
              c.lanes_used() >= kLanesUsed;
     }},
    {Algorithm::kBandAlongPixels, [](const Case& c) {
       return !c.grouped() && c.channels_last() && c.v.K <= kFewFilters &&
              static_cast<int64_t>(c.v.taps.size()) >= kManyTaps && c.band_fits(true) &&
              !c.band_leaves_lanes();
     }},
    {Algorithm::kDirectProduct, [](const Case& c) { return c.channels_last(); }},
    {Algorithm::kBandAlongPixels, [](const Case& c) {
       return !c.grouped() && !c.reads_pixels_in_place() &&
              (c.taps_share_a_band() || c.narrower_side() <= kNarrow) && c.pieces_fit();
     }},
    {Algorithm::kPixelProduct, [](const Case&) { return true; }},
};

constexpr Rule kWgradRules[] = {
    {Algorithm::kDepthwiseColumns, [](const Case& c) { return c.depthwise_columns_square(); }},
    {Algorithm::kDepthwiseChannels, [](const Case& c) { return c.depthwise(); }},
    {Algorithm::kDepthwisePlanes, [](const Case& c) {
       return c.grouped() && depthwise_planes_wgrad_applies(c.v);
     }},
    {Algorithm::kPairWgrad, [](const Case& c) {
       return c.wgrad_by_pairs() && (c.v.step_h > 1 || c.grouped() ||
                                     c.narrower_side() < kWinogradWgradChannels);
     }},
    {Algorithm::kWinograd, [](const Case& c) {
       return c.winograd && c.feeds_winograd_wgrad() && winograd_wgrad_applies(c.v);
     }},
    {Algorithm::kGroupWinograd, [](const Case& c) {
       return c.feeds_group_winograd() && group_winograd_applies(c.v) &&
              group_winograd_wgrad_products(c.v) <= kGroupRowsLeft;
     }},
    {Algorithm::kGroupTiles, [](const Case& c) { return c.narrow_groups(); }},
    {Algorithm::kBandAlongPixels, [](const Case& c) {
       return c.wgrad_narrow() && c.band_fits(true);
     }},
    {Algorithm::kBandAlongChannels, [](const Case& c) {
       return c.grouped() && !c.nchw() && c.wider_side() <= kNarrow && c.band_fits(false);
     }},
    {Algorithm::kPairWgrad, [](const Case& c) { return c.wgrad_by_pairs(); }},
    {Algorithm::kWgradProduct, [](const Case&) { return true; }},
};
// clang-format on

template <size_t kCount>
ConvAlgorithm first_that_applies(const Rule (&rules)[kCount], const Case& c) {
  return std::find_if(rules, rules + kCount - 1, [&](const Rule& r) { return r.applies(c); })
      ->algorithm;
}

// Winograd's algorithm is allowed after an even number of them.
std::atomic<int64_t> switched{0};

// Whether sums are in the type of what is summed.
bool is_wide(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat64; }

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

bool goes_by_patches(const ConvProblem& p, StridedPass pass) {
  // Only dgrad's scattered columns are worse than the patches of two-byte types.
  const bool wide = is_wide(p.dtype);
  const bool half = p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16;
  const bool serves = wide || (half && pass == StridedPass::kDgrad && p.R * p.S > 1);
  const bool narrow = (pass == StridedPass::kFprop || wide) && p.R * p.S > 1 && p.Q < kPatchColumns;
  return serves && p.K >= kPatchFilters && !narrow && patches_apply(p);
}

bool wgrad_goes_by_patches(const ConvProblem& p) {
  return p.R * p.S == 1 && p.K >= kPatchFiltersWgrad && goes_by_patches(p, StridedPass::kFprop);
}

bool fprop_repeats_channels(const ConvProblem& p, bool winograd) {
  // Elements of an image's copy where a stride makes it larger than the outputs.
  constexpr double kMostRepeated = 8 << 20;
  const bool strided = p.stride_h > 1 || p.stride_w > 1;
  if (strided && static_cast<double>(p.H * p.W) * static_cast<double>(p.K) > kMostRepeated)
    return false;
  // At least a vector of what is copied.
  const auto least = kVectorBytes / static_cast<int64_t>(is_wide(p.dtype) ? sizeof(float) : 2);
  if (p.layout != Layout::kNHWC || p.groups == 1 || p.groups != p.C || p.K == p.C || p.K < least)
    return false;
  const Algorithm algorithm = gather_algorithm(fprop_view(repeated_problem(p)), p.dtype, winograd);
  return algorithm == Algorithm::kDepthwiseColumns || algorithm == Algorithm::kDepthwiseWinograd;
}

std::optional<ConvProblem> fprop_by_channels_last(const ConvProblem& p, const ConvView& view) {
  // What Winograd serves goes the same way without it as the samples that it cannot serve.
  constexpr bool winograd = true;
  const Case c{view, p.dtype, winograd};
  if (c.half() || p.groups != 1 || p.layout != Layout::kNCHW || p.weight_layout != Layout::kNCHW ||
      strides_by_winograd(p, StridedPass::kFprop, winograd))
    return std::nullopt;
  const Algorithm algorithm = gather_algorithm(view, p.dtype, winograd);
  if (algorithm == Algorithm::kBandAlongPixels) {
    if (!c.inner_products_repay_copies()) return std::nullopt;
    return merged(channels_last_problem(p));
  }
  if (!c.is(DType::kFloat32) || !c.direct_product_repays_copies(algorithm)) return std::nullopt;
  const ConvProblem q = channels_last_images(p);
  if (strides_by_winograd(q, StridedPass::kFprop, winograd) ||
      gather_algorithm(fprop_view(q), q.dtype, winograd) != Algorithm::kDirectProduct)
    return std::nullopt;
  return q;
}

bool dgrad_by_channels_last(const ConvProblem& p, const std::vector<ConvView>& views,
                            bool winograd) {
  const bool wide = is_wide(p.dtype);
  return wide && p.groups == 1 && p.layout == Layout::kNCHW && p.weight_layout == Layout::kNCHW &&
         views.size() > 1 && std::all_of(views.begin(), views.end(), [&](const ConvView& view) {
           const Algorithm algorithm = gather_algorithm(view, p.dtype, winograd);
           return algorithm == Algorithm::kBandProduct || algorithm == Algorithm::kPixelProduct ||
                  algorithm == Algorithm::kWinograd;
         });
}

bool wgrad_by_channels_last(const ConvProblem& p, const ConvView& view, bool winograd) {
  const Case c{view, p.dtype, winograd};
  // Weights of more filters are written as they lie by transposing the products.
  const bool few = c.is(DType::kFloat32) && p.groups == 1 && view.K <= kNarrow &&
                   view.taps.size() > 1 && view.C % (kVectorBytes / c.element_size()) == 0;
  return few && p.layout == Layout::kNCHW && p.weight_layout == Layout::kNCHW &&
         static_cast<double>(view.pixels() * static_cast<int64_t>(view.taps.size())) >=
             kWgradCopies * static_cast<double>(view.H * view.W) &&
         wgrad_algorithm(view, p.dtype, winograd) == Algorithm::kWgradProduct &&
         wgrad_algorithm(fprop_view(channels_last_images(p)), p.dtype, winograd) ==
             Algorithm::kWgradProduct;
}

bool dgrad_by_columns(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd) {
  const bool wide = is_wide(p.dtype);
  const bool pairs = p.dtype == DType::kBFloat16 && has_pair_products();
  if ((!wide && !pairs) || views.empty() || !col2im_applies(p)) return false;
  // Whose columns are those of planes in either layout. Weights of neighbouring channels are read
  // for one at a time, which many do not repay.
  if (pairs && p.layout != Layout::kNCHW) {
    if (p.C > kFewFilters) return false;
    const ConvProblem planes = contiguous_problem(p);
    bool covers_all;
    return dgrad_by_columns(planes, dgrad_views(planes, &covers_all), winograd);
  }
  if (pairs && (p.R * p.S < kColumnPairTaps || p.P * p.Q < kColumnPairPixels)) return false;
  const auto pixels = static_cast<double>(p.P * p.Q), taps = static_cast<double>(p.R * p.S);
  const double size = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  if (static_cast<double>(p.C) * taps * pixels * size > kMostColumnBytes) return false;
  double gathered = 0;
  for (const ConvView& view : views) {
    const Algorithm algorithm = gather_algorithm(view, p.dtype, winograd);
    const bool transforms = algorithm == Algorithm::kWinograd && views.size() > 1;
    if (algorithm != Algorithm::kBandProduct && algorithm != Algorithm::kPixelProduct &&
        algorithm != Algorithm::kDirectProduct && !transforms &&
        !(pairs && algorithm == Algorithm::kBandAlongPixels))
      return false;
    gathered += static_cast<double>(view.pixels()) * static_cast<double>(view.taps.size()) *
                (transforms ? 0.5 : 1);
  }
  const double saved = gathered / (pixels * taps) - 1,
               fold = kFoldProducts / static_cast<double>(p.K);
  if (p.layout != Layout::kNCHW) return saved >= fold;
  // A single phase of a stride leaves pixels out, which the fold of planes does not know.
  return views.size() == 1 && views[0].dst.column == 1 && p.K >= kColumnFilters && saved >= fold &&
         p.P * p.Q <= kColumnPixels;
}

bool strides_by_winograd(const ConvProblem& p, StridedPass pass, bool winograd) {
  if (!winograd || !strided_winograd_applies(p)) return false;
  const bool fprop = pass == StridedPass::kFprop, channels_last = p.layout == Layout::kNHWC;
  // The direct product of pairs does as well, but for the few filters of a first layer's dgrad.
  const bool pairs = p.dtype == DType::kBFloat16 && has_pair_products();
  if (pairs && (fprop || p.C > kFewFilters)) return false;
  const bool wide = p.K >= kStridedChannels && (p.C >= kStridedChannels || p.R > 3);
  const int64_t least = fprop && channels_last ? kStridedPixelsChannelsLast : kStridedPixels;
  const double saving = fprop ? kStridedSaving : kStridedSavingDgrad;
  const auto direct = static_cast<double>(p.P * p.Q) * static_cast<double>(p.R * p.S);
  return wide && p.P * p.Q >= least &&
         direct >= saving * static_cast<double>(strided_winograd_products(p, pass));
}

std::optional<ConvAlgorithm> dgrad_at_once(const ConvProblem& p) {
  if (p.layout == Layout::kNCHW) {
    if (depthwise_planes_spread_applies(p)) return Algorithm::kDepthwisePlanes;
    if (depthwise_phases_applies(p)) return Algorithm::kDepthwisePhases;
    return std::nullopt;
  }
  const bool spreads = p.dtype == DType::kFloat64 ? depthwise_columns_spread_applies<double>(p)
                                                  : depthwise_columns_spread_applies<float>(p);
  return spreads ? std::optional(Algorithm::kDepthwiseColumns) : std::nullopt;
}

bool strides_by_groups(const ConvProblem& p, const std::vector<ConvView>& views) {
  if (views.size() < 2 || std::max(p.stride_h, p.stride_w) > kGroupStride) return false;
  const Case c{views[0], p.dtype, false};
  return c.grouped() && c.v.C > 1 && c.wider_side() <= kGroupWidthPixels &&
         group_dgrad_applies(views, c.element_size());
}

bool strides_by_image(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd) {
  return p.dtype == DType::kBFloat16 && p.layout == Layout::kNCHW && views.size() > 1 &&
         std::all_of(views.begin(), views.end(), [&](const ConvView& view) {
           return gather_algorithm(view, p.dtype, winograd) == Algorithm::kDirectProduct;
         });
}

ConvAlgorithm wgrad_algorithm(const ConvView& view, DType dtype, bool winograd) {
  return first_that_applies(kWgradRules, {view, dtype, winograd});
}

}  // namespace torchconv::cpu
