// The ways of whole problems, and the sizes from which each wins.
#include "cpu/conv_ways.h"

#include <algorithm>

#include "cpu/channel_repeat.h"
#include "cpu/channels_last_copy.h"
#include "cpu/col2im.h"
#include "cpu/conv_case.h"
#include "cpu/conv_choice.h"
#include "cpu/depthwise_columns.h"
#include "cpu/depthwise_phases.h"
#include "cpu/depthwise_planes.h"
#include "cpu/group_gather.h"
#include "cpu/microkernels/direct_tile.h"
#include "cpu/patches.h"
#include "cpu/sample_patches.h"

namespace torchconv::cpu {
namespace {

bool multiplies_pairs(const ConvProblem& p) {
  return p.dtype == DType::kBFloat16 && has_pair_products();
}

// Images and weights as PyTorch has them by default.
bool all_nchw(const ConvProblem& p) {
  return p.layout == Layout::kNCHW && p.weight_layout == Layout::kNCHW;
}

// Whether the inner products of a copy in channels_last take less than bands along the pixels.
bool inner_products_repay_copies(const ConvCase& c) {
  // What an inner product takes beside a sum along pixels, with the sum of its lanes, and what a
  // copy in channels_last takes of an element, as a part of a vector's product.
  constexpr double kInnerVectors = 1.2, kCopyVectors = 0.4;
  const ConvView& v = c.v;
  const auto filters = static_cast<double>(v.K * c.taps());
  const double saved =
      filters * (static_cast<double>(c.band_vectors()) -
                 kInnerVectors * static_cast<double>(v.pixels()) / static_cast<double>(c.lanes()));
  return v.K <= kInnerFiltersMost && v.C % c.lanes() == 0 &&
         saved >= kCopyVectors * (static_cast<double>(v.H * v.W) + filters);
}

// The same of the direct product and what `algorithm` does for each row of a tap.
bool direct_product_repays_copies(const ConvCase& c, ConvAlgorithm algorithm) {
  // Terms that repay the calls, and the part of them that must lie inside the image.
  constexpr int64_t kCopiedTerms = 192;
  constexpr double kCopiedInside = 0.85;
  // Of a row of outputs through a tap: products of short rows in bands along filters, times their
  // length, and packing along pixels beside products of so many filters, that take as long as an
  // element's copy, which another core may have to read; and what the copy of a result takes of
  // that.
  constexpr double kBandRowCopies = 2, kPixelRowCopies = 85, kPackingFilters = 160,
                   kResultCopies = 0.5;
  const ConvView& v = c.v;
  if (c.taps() < 2 || v.terms() < kCopiedTerms) return false;
  const auto rows = static_cast<double>(c.taps() * v.I), K = static_cast<double>(v.K);
  const double copied = static_cast<double>(v.H * v.W) + kResultCopies * K *
                                                             static_cast<double>(v.pixels()) /
                                                             static_cast<double>(v.C);
  // Bands leave most of the padding out.
  if (algorithm == ConvAlgorithm::kBandProduct)
    return rows * K >= kBandRowCopies * static_cast<double>(v.J) * copied &&
           c.products_inside() >= kCopiedInside * static_cast<double>(v.pixels() * c.taps());
  return algorithm == ConvAlgorithm::kPixelProduct &&
         rows * (kPackingFilters + K) >= kPixelRowCopies * copied;
}

// Outputs so few that weights are taken apart for longer than these meet them, of so many terms and
// filters that their patches are copied for less.
bool few_samples_repay_copies(const ConvProblem& p) {
  constexpr int64_t kOutputs = 12, kTerms = 1024, kFilters = 32;
  return is_wide(p.dtype) && p.R * p.S > 1 && p.P * p.Q <= kOutputs && p.C * p.R * p.S >= kTerms &&
         p.K >= kFilters && sample_patches_apply(p);
}

}  // namespace

bool fprop_by_samples(const ConvProblem& p, const ConvView& view) {
  // As for fprop_by_channels_last.
  constexpr bool winograd = true;
  return all_nchw(p) && few_samples_repay_copies(p) &&
         !strides_by_winograd(p, StridedPass::kFprop, winograd) &&
         gather_algorithm(view, p.dtype, winograd) == ConvAlgorithm::kPixelProduct;
}

bool wgrad_by_samples(const ConvProblem& p, const ConvView& view, bool winograd) {
  // Patches that stay in a second-level cache, and filters whose products repay them where a tap's
  // pixels have the channels side by side.
  constexpr int64_t kBytes = 512 << 10, kFiltersChannelsLast = 192;
  const int64_t size = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return few_samples_repay_copies(p) && (all_nchw(p) || p.K >= kFiltersChannelsLast) &&
         p.N * p.P * p.Q * p.C * p.R * p.S * size <= kBytes &&
         wgrad_algorithm(view, p.dtype, winograd) == ConvAlgorithm::kWgradProduct;
}

bool goes_by_patches(const ConvProblem& p, StridedPass pass) {
  // Patches of several taps are copied by rows of outputs: shorter ones cost more than the
  // product's own copy.
  constexpr int64_t kPatchColumns = 4;
  // Only dgrad's scattered columns are worse than the patches of two-byte types.
  const bool wide = is_wide(p.dtype);
  const bool serves = wide || (is_half(p.dtype) && pass == StridedPass::kDgrad && p.R * p.S > 1);
  const bool narrow = (pass == StridedPass::kFprop || wide) && p.R * p.S > 1 && p.Q < kPatchColumns;
  return serves && p.K >= kPatchFilters && !narrow && patches_apply(p);
}

bool wgrad_goes_by_patches(const ConvProblem& p) {
  // Those from which the weight gradient reads a strided image several times, see conv_wgrad.cpp.
  constexpr int64_t kFilters = 512;
  return p.R * p.S == 1 && p.K >= kFilters && goes_by_patches(p, StridedPass::kFprop);
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
  const ConvAlgorithm algorithm =
      gather_algorithm(fprop_view(repeated_problem(p)), p.dtype, winograd);
  return algorithm == ConvAlgorithm::kDepthwiseColumns ||
         algorithm == ConvAlgorithm::kDepthwiseWinograd;
}

std::optional<ConvProblem> fprop_by_channels_last(const ConvProblem& p, const ConvView& view) {
  // What Winograd serves goes the same way without it as the samples that it cannot serve.
  constexpr bool winograd = true;
  const ConvCase c{view, p.dtype, winograd};
  if (is_half(p.dtype) || p.groups != 1 || !all_nchw(p) ||
      strides_by_winograd(p, StridedPass::kFprop, winograd))
    return std::nullopt;
  const ConvAlgorithm algorithm = gather_algorithm(view, p.dtype, winograd);
  if (algorithm == ConvAlgorithm::kBandAlongPixels) {
    if (!inner_products_repay_copies(c)) return std::nullopt;
    return merged(channels_last_problem(p));
  }
  if (!c.is(DType::kFloat32) || !direct_product_repays_copies(c, algorithm)) return std::nullopt;
  const ConvProblem q = channels_last_images(p);
  if (strides_by_winograd(q, StridedPass::kFprop, winograd) ||
      gather_algorithm(fprop_view(q), q.dtype, winograd) != ConvAlgorithm::kDirectProduct)
    return std::nullopt;
  return q;
}

bool dgrad_by_channels_last(const ConvProblem& p, const std::vector<ConvView>& views,
                            bool winograd) {
  if (!is_wide(p.dtype) || p.groups != 1 || !all_nchw(p)) return false;
  // The fold of columns that have the channels side by side has whole vectors at any width.
  if (views.size() == 1) return dgrad_by_columns(p, views, winograd);
  return views.size() > 1 && std::all_of(views.begin(), views.end(), [&](const ConvView& view) {
           const ConvAlgorithm algorithm = gather_algorithm(view, p.dtype, winograd);
           return algorithm == ConvAlgorithm::kBandProduct ||
                  algorithm == ConvAlgorithm::kPixelProduct ||
                  algorithm == ConvAlgorithm::kWinograd;
         });
}

bool wgrad_by_channels_last(const ConvProblem& p, const ConvView& view, bool winograd) {
  // Products of a pixel with a filter's weight gradients that repay its copy.
  constexpr double kCopies = 4.5;
  const ConvCase c{view, p.dtype, winograd};
  // Weights of more filters are written as they lie by transposing the products.
  const bool few = c.is(DType::kFloat32) && p.groups == 1 && view.K <= kNarrow && c.taps() > 1 &&
                   view.C % c.lanes() == 0;
  return few && all_nchw(p) &&
         static_cast<double>(view.pixels() * c.taps()) >=
             kCopies * static_cast<double>(view.H * view.W) &&
         wgrad_algorithm(view, p.dtype, winograd) == ConvAlgorithm::kWgradProduct &&
         wgrad_algorithm(fprop_view(channels_last_images(p)), p.dtype, winograd) ==
             ConvAlgorithm::kWgradProduct;
}

bool dgrad_by_columns(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd) {
  // Products that each element of dx's columns leaves out, from which these pay for their fold; and
  // the columns of a sample that memory is taken for.
  constexpr double kFoldProducts = 34, kMostBytes = 32 << 20;
  // In NCHW bands of rows leave out most of these products too, and such a direct product takes the
  // weights apart: as long as for the products of so many pixels. Fewer filters do not pay for the
  // fold of planes.
  constexpr int64_t kPixels = 48, kFilters = 128;
  // Columns of pairs (column_pairs.h) pack the weights of a channel for few rows where there are
  // few taps, and for few columns where there are few pixels.
  constexpr int64_t kPairTaps = 28, kPairPixels = 24;
  const bool pairs = multiplies_pairs(p);
  if ((!is_wide(p.dtype) && !pairs) || views.empty() || !col2im_applies(p)) return false;
  // Whose columns are those of planes in either layout. Weights of neighbouring channels are read
  // for one at a time, which many do not repay.
  if (pairs && p.layout != Layout::kNCHW) {
    if (p.C > kFewFilters) return false;
    const ConvProblem planes = contiguous_problem(p);
    bool covers_all;
    return dgrad_by_columns(planes, dgrad_views(planes, &covers_all), winograd);
  }
  if (pairs && (p.R * p.S < kPairTaps || p.P * p.Q < kPairPixels)) return false;
  const auto pixels = static_cast<double>(p.P * p.Q), taps = static_cast<double>(p.R * p.S);
  const double size = p.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  if (static_cast<double>(p.C) * taps * pixels * size > kMostBytes) return false;
  double gathered = 0;
  for (const ConvView& view : views) {
    const ConvAlgorithm algorithm = gather_algorithm(view, p.dtype, winograd);
    const bool transforms = algorithm == ConvAlgorithm::kWinograd && views.size() > 1;
    if (algorithm != ConvAlgorithm::kBandProduct && algorithm != ConvAlgorithm::kPixelProduct &&
        algorithm != ConvAlgorithm::kDirectProduct && !transforms &&
        !(pairs && algorithm == ConvAlgorithm::kBandAlongPixels))
      return false;
    gathered += static_cast<double>(view.pixels()) * static_cast<double>(view.taps.size()) *
                (transforms ? 0.5 : 1);
  }
  const double saved = gathered / (pixels * taps) - 1,
               fold = kFoldProducts / static_cast<double>(p.K);
  if (p.layout != Layout::kNCHW) return saved >= fold;
  // A single phase of a stride leaves pixels out, which the fold of planes does not know.
  return views.size() == 1 && views[0].dst.column == 1 && p.K >= kFilters && saved >= fold &&
         p.P * p.Q <= kPixels;
}

bool strides_by_winograd(const ConvProblem& p, StridedPass pass, bool winograd) {
  // Winograd's transforms of the source are shared by all filters and those of the destination by
  // all channels, so both sides must be wide.
  constexpr int64_t kChannels = 16;
  // The direct algorithm packs the weights too, and dgrad's does so once for each residue; in
  // channels_last fprop's has least to pack.
  constexpr int64_t kPixels = 4, kPixelsChannelsLast = 26;
  // How many times fewer multiplications pay for the transforms.
  constexpr double kSaving = 1.4, kSavingDgrad = 1.1;
  if (!winograd || !strided_winograd_applies(p)) return false;
  const bool fprop = pass == StridedPass::kFprop, channels_last = p.layout == Layout::kNHWC;
  // The direct product of pairs does as well, but for the few filters of a first layer's dgrad.
  if (multiplies_pairs(p) && (fprop || p.C > kFewFilters)) return false;
  const bool wide = p.K >= kChannels && (p.C >= kChannels || p.R > 3);
  const int64_t least = fprop && channels_last ? kPixelsChannelsLast : kPixels;
  const double saving = fprop ? kSaving : kSavingDgrad;
  const auto direct = static_cast<double>(p.P * p.Q) * static_cast<double>(p.R * p.S);
  return wide && p.P * p.Q >= least &&
         direct >= saving * static_cast<double>(strided_winograd_products(p, pass));
}

std::optional<ConvAlgorithm> dgrad_at_once(const ConvProblem& p) {
  if (p.layout == Layout::kNCHW) {
    if (depthwise_planes_spread_applies(p)) return ConvAlgorithm::kDepthwisePlanes;
    if (depthwise_phases_applies(p)) return ConvAlgorithm::kDepthwisePhases;
    return std::nullopt;
  }
  const bool spreads = p.dtype == DType::kFloat64 ? depthwise_columns_spread_applies<double>(p)
                                                  : depthwise_columns_spread_applies<float>(p);
  return spreads ? std::optional(ConvAlgorithm::kDepthwiseColumns) : std::nullopt;
}

bool strides_by_groups(const ConvProblem& p, const std::vector<ConvView>& views) {
  // Phases of larger strides are not computed together.
  constexpr int64_t kStride = 4;
  if (views.size() < 2 || std::max(p.stride_h, p.stride_w) > kStride) return false;
  const ConvCase c{views[0], p.dtype, false};
  return c.grouped() && c.v.C > 1 && c.wider_side() <= kGroupWidthPixels &&
         group_dgrad_applies(views, c.element_size());
}

bool strides_by_image(const ConvProblem& p, const std::vector<ConvView>& views, bool winograd) {
  return p.dtype == DType::kBFloat16 && p.layout == Layout::kNCHW && views.size() > 1 &&
         std::all_of(views.begin(), views.end(), [&](const ConvView& view) {
           return gather_algorithm(view, p.dtype, winograd) == ConvAlgorithm::kDirectProduct;
         });
}

}  // namespace torchconv::cpu
