// See conv_explain.h. Of an algorithm's own operations, Winograd's are the products of its tiles
// and, as additions take as long as multiply-adds, two for each step of the transforms; the other
// algorithms multiply by every tap that reaches the image.
#include "cpu/conv_explain.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "cpu/band_gemm.h"
#include "cpu/channel_pairs.h"
#include "cpu/channel_repeat.h"
#include "cpu/channels_last_copy.h"
#include "cpu/conv_band_wgrad.h"
#include "cpu/conv_case.h"
#include "cpu/conv_choice.h"
#include "cpu/conv_view.h"
#include "cpu/conv_ways.h"
#include "cpu/depthwise_winograd.h"
#include "cpu/direct_gemm.h"
#include "cpu/group_band.h"
#include "cpu/group_winograd.h"
#include "cpu/group_winograd_planes.h"
#include "cpu/group_winograd_wgrad.h"
#include "cpu/microkernels/channel_columns_winograd.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/microkernels/gemm_pairs.h"
#include "cpu/microkernels/group_winograd.h"
#include "cpu/microkernels/inner_product.h"
#include "cpu/microkernels/pixel_product.h"
#include "cpu/microkernels/plane_taps.h"
#include "cpu/microkernels/shared_taps.h"
#include "cpu/pair_wgrad.h"
#include "cpu/patches.h"
#include "cpu/sample_gemm.h"
#include "cpu/sample_patches.h"
#include "cpu/wgrad_pixels.h"
#include "cpu/winograd.h"
#include "cpu/winograd_rows.h"
#include "cpu/winograd_rows_points.h"
#include "cpu/winograd_rows_transforms.h"
#include "cpu/winograd_tiles.h"
#include "cpu/winograd_transforms.h"
#include "cpu/winograd_wgrad.h"

namespace torchconv::cpu {
namespace {

// Steps of Winograd's transforms of a tile of a channel, a tile of a filter, and a filter's
// channel.
struct TransformSteps {
  double source, product, weight;
};
TransformSteps transform_steps(const ConvView& v) {
  return v.taps.size() == 25 ? TransformSteps{144, 64, 165} : TransformSteps{144, 100, 72};
}

const char* name_of(ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::kWinograd:
      return "Winograd";
    case ConvAlgorithm::kStridedWinograd:
      return "Winograd of stride 2";
    case ConvAlgorithm::kWinogradRows:
      return "Winograd along rows";
    case ConvAlgorithm::kDepthwiseWinograd:
      return "depthwise minimal filtering, vectors along channels";
    case ConvAlgorithm::kDepthwiseChannels:
      return "depthwise taps, vectors along channels";
    case ConvAlgorithm::kDepthwiseColumns:
      return "depthwise rolling columns, vectors along channels";
    case ConvAlgorithm::kDepthwisePlanes:
      return "depthwise rows, vectors along pixels";
    case ConvAlgorithm::kPlanesWinograd:
      return "depthwise minimal filtering, vectors along pixels";
    case ConvAlgorithm::kDepthwisePhases:
      return "depthwise phases of bands of rows, vectors along pixels";
    case ConvAlgorithm::kGroupWinograd:
      return "Winograd, groups side by side in vectors";
    case ConvAlgorithm::kGroupPlanes:
      return "Winograd, vectors along tiles of a group's planes";
    case ConvAlgorithm::kGroupTiles:
      return "bands of rows, groups side by side in vectors";
    case ConvAlgorithm::kBandAlongPixels:
      return "bands of rows, vectors along pixels";
    case ConvAlgorithm::kBandAlongChannels:
      return "bands of rows, vectors along channels";
    case ConvAlgorithm::kInnerProduct:
      return "inner products along channels";
    case ConvAlgorithm::kSharedTaps:
      return "taps that share their pixels";
    case ConvAlgorithm::kTapRuns:
      return "runs of taps in place";
    case ConvAlgorithm::kPlaneTaps:
      return "taps of planes in place, vectors along pixels";
    case ConvAlgorithm::kSampleProduct:
      return "matrix product of samples, weights in place";
    case ConvAlgorithm::kDirectProduct:
      return "matrix product in place";
    case ConvAlgorithm::kBandProduct:
      return "bands of rows, vectors along filters";
    case ConvAlgorithm::kPixelProduct:
      return "matrix product, vectors along pixels";
    case ConvAlgorithm::kPlanePairs:
      return "matrix product of pairs of planes";
    case ConvAlgorithm::kWgradProduct:
      return "matrix product over pixels";
    case ConvAlgorithm::kPairWgrad:
      return "matrix product over pairs of pixels";
  }
  return "";
}

double product_of(std::initializer_list<int64_t> sizes) {
  double product = 1;
  for (const int64_t size : sizes) product *= static_cast<double>(size);
  return product;
}

std::string text(const char* format, int64_t a, int64_t b, int64_t c) {
  char buffer[160];
  std::snprintf(buffer, sizeof(buffer), format, static_cast<long long>(a),
                static_cast<long long>(b), static_cast<long long>(c));
  return buffer;
}

std::string band_blocking(const ConvBand& band) {
  return text("%lld bands of %lld rows, %lld positions wide", band.bands, band.band, band.width) +
         (band.packed ? ", several pixels in a vector" : "");
}

// Vectors of channels or, in a gather of bfloat16, of pairs of them.
std::string group_blocking(const ConvView& v, int64_t size) {
  const GroupBand band(v, size, size == 8 ? kPermutesLanes<double> : kPermutesLanes<float>);
  return text("%lld bands of %lld rows, %lld groups together", band.bands, band.band, band.groups);
}

std::string group_winograd_blocking(const char* scheme, const ConvView& v, const GroupBand& band) {
  return scheme + text(": %lld tiles along rows, %lld bands of rows, %lld groups together",
                       winograd::TileAxis(v.J, 1, kGroupWinogradOutputs).count, band.bands,
                       band.groups);
}

std::string gather_blocking(const ConvView& v, DType dtype, ConvAlgorithm algorithm) {
  const int64_t size = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t lanes = kVectorBytes / size;
  switch (algorithm) {
    case ConvAlgorithm::kWinograd: {
      const winograd::Grid plan(v);
      const int64_t block_vectors = dtype == DType::kFloat64
                                        ? winograd::Plan<double>(v).block_vectors
                                        : winograd::Plan<float>(v).block_vectors;
      const char* format = plan.side == 3
                               ? "F(4x4,3x3): %lld x %lld tiles a sample, sums of %lld channels"
                               : "F(2x2,5x5): %lld x %lld tiles a sample, sums of %lld channels";
      return text(format, plan.rows.count, plan.columns.count,
                  std::min(v.C, block_vectors * lanes));
    }
    case ConvAlgorithm::kWinogradRows:
      return text("F(4,n) along rows, at most 3 of %lld taps: %lld tiles, %lld filters in a vector",
                  tap_span(v, &ConvTap::w).size(), ceil_div(v.J, int64_t{winograd::rows::kOutputs}),
                  lanes) +
             (winograd::rows::points_apart(v) ? ", a product for each point" : "");
    case ConvAlgorithm::kBandAlongPixels: {
      const std::vector<ConvView> pieces = column_pieces(v, size, lanes);
      const std::string blocking = band_blocking(ConvBand(pieces[0], true, size, lanes));
      return pieces.size() == 1
                 ? blocking
                 : std::to_string(pieces.size()) + " pieces of the columns: " + blocking;
    }
    case ConvAlgorithm::kBandAlongChannels:
      return band_blocking(ConvBand(v, false, size, lanes, 0, packs_channels(v, lanes)));
    case ConvAlgorithm::kGroupWinograd:
      return group_winograd_blocking("F(2x4,3x3)", v, group_winograd_band(v, kGroupWinogradRows));
    case ConvAlgorithm::kGroupPlanes:
      return text("F(2x4,3x3): %lld vectors of tiles for the %lld outputs of a filter",
                  group_planes_vectors(v), v.pixels(), 0);
    case ConvAlgorithm::kGroupTiles:
      return group_blocking(dtype == DType::kBFloat16 && groups_take_pairs(v) ? pair_view(v) : v,
                            size);
    case ConvAlgorithm::kDepthwiseWinograd:
      return text(
          "F(2,3) and F(2,2) down the columns of the kernel, tiles of 2 x %lld pixels, "
          "%lld channels in a vector",
          kWinogradTile, lanes, 0);
    case ConvAlgorithm::kDepthwiseColumns:
    case ConvAlgorithm::kDepthwiseChannels:
      return text("%lld rows of %lld pixels, %lld channels in a vector", v.I, v.J, lanes);
    case ConvAlgorithm::kPlanesWinograd:
      return text(
          "F(2,3) and F(2,2) down the columns of the kernel, planes of %lld rows of %lld "
          "pixels, %lld pixels in a vector",
          v.I, v.J, lanes);
    case ConvAlgorithm::kDepthwisePlanes:
      return text("planes of %lld rows of %lld pixels, %lld pixels in a vector", v.I, v.J, lanes);
    case ConvAlgorithm::kInnerProduct:
      return text("register tiles of %lld x %lld, %lld terms in a vector", kInnerPixels,
                  std::min(v.K, kInnerFilters), lanes);
    case ConvAlgorithm::kSharedTaps:
      return text("register tiles of %lld x %lld, taps side by side", kSharedTapsOutputs, lanes, 0);
    case ConvAlgorithm::kTapRuns:
      return text("register tiles of %lld x %lld, runs of %lld terms", kMaxRows,
                  kMaxVectors * lanes, tap_span(v, &ConvTap::w).size() * v.C);
    case ConvAlgorithm::kPlaneTaps: {
      const int64_t filters = ceil_div(v.K, ceil_div(v.K, int64_t{kPlaneFilters}));
      return text("register tiles of %lld x %lld, sums of at most %lld terms", filters,
                  plane_vectors(filters) * lanes, kDepth);
    }
    case ConvAlgorithm::kSampleProduct:
      return v.weight_c == 1 ? text("register tiles of %lld x %lld, %lld terms in a vector",
                                    kInnerPixels, kInnerFilters, lanes)
                             : text("register tiles of %lld x %lld, sums of %lld terms",
                                    kProductRows, kProductVectors * lanes, kSampleRows);
    case ConvAlgorithm::kDirectProduct:
      return text("register tiles of %lld x %lld, sums of %lld channels", kMaxRows,
                  kMaxVectors * lanes, direct_gemm_chunk(v, size));
    case ConvAlgorithm::kPlanePairs:
      return text("register tiles of %lld x %lld, vectors along pixels", kMaxRows,
                  kMaxVectors * lanes, 0);
    case ConvAlgorithm::kBandProduct:
      return text("register tiles of %lld x %lld, sums of at most %lld terms", kMaxRows,
                  kMaxVectors * lanes, kBandBlockTerms);
    case ConvAlgorithm::kPixelProduct:
      return text("register tiles of %lld x %lld, sums of at most %lld terms", kMaxRows,
                  kMaxVectors * lanes, kDepth);
    case ConvAlgorithm::kWgradProduct:
      return text("register tiles of %lld x %lld, sums of at most %lld pixels", kProductRows,
                  kProductVectors * lanes, WgradPixels(v).chunk());
    case ConvAlgorithm::kPairWgrad:
      return text("register tiles of %lld x %lld, sums of at most %lld pixels", kMaxRows,
                  kMaxVectors * lanes, kPairWgradPixels);
    case ConvAlgorithm::kStridedWinograd:
    case ConvAlgorithm::kDepthwisePhases:
      break;  // of a problem, not of a view
  }
  return "";
}

bool folds(const ConvProblem& p) { return p.R > 3; }

std::string strided_blocking(const ConvProblem& p) {
  if (folds(p)) return "F(3x3,4x4) of the stride's four phases as channels";
  return "F(4x4,2x2) of every other pixel, plain products between";
}

std::string wgrad_blocking(const ConvView& v, DType dtype, ConvAlgorithm algorithm) {
  const int64_t size = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  if (algorithm == ConvAlgorithm::kBandAlongPixels ||
      algorithm == ConvAlgorithm::kBandAlongChannels) {
    return band_blocking(band_wgrad_band(v, algorithm == ConvAlgorithm::kBandAlongPixels, size,
                                         kVectorBytes / size));
  }
  if (algorithm == ConvAlgorithm::kGroupWinograd)
    return group_winograd_blocking("F(3,4) along rows", v, GroupWinogradDot(v).band());
  if (algorithm == ConvAlgorithm::kGroupTiles) return group_blocking(v, size);
  if (algorithm != ConvAlgorithm::kWinograd) return gather_blocking(v, dtype, algorithm);
  const WinogradWgradCost cost = winograd_wgrad_cost(v);
  return cost.scheme + text(": %lld tiles a sample of %lld, %lld products of each", cost.tiles, v.N,
                            cost.products / cost.tiles);
}

double multiplications(const ConvView& v) {
  return product_of({v.N, v.groups, v.K, v.pixels()}) * static_cast<double>(v.terms());
}

double gather_operations(const ConvView& v, ConvAlgorithm algorithm) {
  if (algorithm == ConvAlgorithm::kWinogradRows)
    return 2 * multiplications(v) * winograd_rows_products(v);
  if (algorithm == ConvAlgorithm::kGroupWinograd || algorithm == ConvAlgorithm::kGroupPlanes)
    return 2 * multiplications(v) * group_winograd_products(v);
  if (algorithm == ConvAlgorithm::kDepthwiseWinograd || algorithm == ConvAlgorithm::kPlanesWinograd)
    return 2 * multiplications(v) * depthwise_winograd_products(v);
  if (algorithm != ConvAlgorithm::kWinograd) return 2 * multiplications(v);
  const winograd::Grid plan(v);
  const auto tiles = static_cast<double>(plan.tiles());
  const auto C = static_cast<double>(v.C), K = static_cast<double>(v.K);
  const TransformSteps steps = transform_steps(v);
  return 2 * static_cast<double>(v.groups) *
         (product_of({v.N, winograd_products(v), v.C, v.K}) + tiles * C * steps.source +
          tiles * K * steps.product + C * K * steps.weight);
}

constexpr const char* kCopies = "by way of channels_last images: ";
constexpr const char* kSamples = "patches as samples: ";
constexpr const char* kRepeats = "by way of an image with each channel once for each filter: ";

// Without the transforms.
double strided_operations(const ConvProblem& p, StridedPass pass) {
  return 2 * product_of({p.N, p.C, p.K, strided_winograd_products(p, pass)});
}

double wgrad_operations(const ConvView& v, ConvAlgorithm algorithm) {
  if (algorithm == ConvAlgorithm::kGroupWinograd)
    return 2 * multiplications(v) * group_winograd_wgrad_products(v);
  if (algorithm != ConvAlgorithm::kWinograd) return 2 * multiplications(v);
  const WinogradWgradCost cost = winograd_wgrad_cost(v);
  const auto tiles = product_of({v.N, cost.tiles});
  const auto C = static_cast<double>(v.C), K = static_cast<double>(v.K);
  const TransformSteps steps = transform_steps(v);
  return 2 * static_cast<double>(v.groups) *
         (product_of({v.N, cost.products, v.C, v.K}) + tiles * (C + K) * steps.source +
          C * K * (v.taps.size() == 25 ? steps.weight : steps.product));
}

struct Line {
  const char* pass;
  ConvAlgorithm algorithm;
  const char* otherwise;  // for what is not finite
  std::string blocking;
  double direct, operations, bytes;
};

std::string formatted(const Line& line) {
  char numbers[120];
  std::snprintf(numbers, sizeof(numbers), "\t%.17g\t%.17g\t%.17g\n", line.direct, line.operations,
                line.bytes);
  return std::string(line.pass) + '\t' + name_of(line.algorithm) + '\t' + line.otherwise + '\t' +
         line.blocking + numbers;
}

// No window holds a pixel of the image.
std::string zeros(const char* pass, double bytes) {
  return std::string(pass) + "\tzeros\t\tno window reads the image\t0\t0\t" +
         std::to_string(bytes) + '\n';
}

const char* gather_otherwise(const ConvView& v, DType dtype, ConvAlgorithm algorithm) {
  return algorithm == ConvAlgorithm::kWinograd || algorithm == ConvAlgorithm::kWinogradRows ||
                 algorithm == ConvAlgorithm::kGroupWinograd ||
                 algorithm == ConvAlgorithm::kGroupPlanes ||
                 algorithm == ConvAlgorithm::kDepthwiseWinograd ||
                 algorithm == ConvAlgorithm::kPlanesWinograd
             ? name_of(gather_algorithm(v, dtype, false))
             : "";
}

int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Whether dgrad goes by `way`, and by no way that is asked for first.
bool dgrad_goes(bool (*way)(const ConvProblem&, const std::vector<ConvView>&, bool),
                const ConvProblem& p, bool winograd) {
  bool covers_all = false;
  const std::vector<ConvView> views = dgrad_views(p, &covers_all);
  return !dgrad_at_once(p) &&
         !(covers_all && strides_by_winograd(p, StridedPass::kDgrad, winograd)) &&
         way(p, views, winograd);
}

}  // namespace

std::string conv2d_explain(const ConvProblem& problem) {
  const ConvProblem p = merged(problem);
  const bool winograd = winograd_allowed();
  const double direct = 2 * product_of({p.N, p.K, p.P, p.Q, p.C / p.groups, p.R, p.S});
  const double bytes =
      static_cast<double>(element_size(p.dtype)) *
      (product_of({p.N, p.C, p.H, p.W}) + product_of({p.K, p.C / p.groups, p.R, p.S}) +
       product_of({p.N, p.K, p.P, p.Q}));
  const auto words = [](bool by_patches) { return by_patches ? "patches as pixels: " : ""; };
  const std::optional<ConvProblem> copies_x = fprop_by_channels_last(p, fprop_view(p));
  const bool unfolds_x = !copies_x && goes_by_patches(p, StridedPass::kFprop);
  const bool samples_x = !copies_x && !unfolds_x && fprop_by_samples(p, fprop_view(p));
  const bool repeats_x = !unfolds_x && !samples_x && fprop_repeats_channels(p, winograd);
  const ConvProblem fprop_problem = unfolds_x   ? patch_problem(p)
                                    : samples_x ? sample_problem(p)
                                    : repeats_x ? merged(repeated_problem(p))
                                    : copies_x  ? *copies_x
                                                : p;
  const ConvView view = fprop_view(fprop_problem);
  std::string lines;

  bool covers_all = false;
  const bool folds_dx = goes_by_patches(p, StridedPass::kDgrad);
  const bool turns = !folds_dx && dgrad_goes(dgrad_by_channels_last, p, winograd);
  const ConvProblem d = turns ? merged(channels_last_problem(p)) : p;
  const bool adds_dx = !folds_dx && dgrad_goes(dgrad_by_columns, d, winograd);
  const ConvProblem q = folds_dx || adds_dx ? patch_problem(d) : d;
  const std::vector<ConvView> views = dgrad_views(q, &covers_all);
  const auto strided_line = [&](const char* name, StridedPass pass, const ConvView& v) {
    return formatted({name, ConvAlgorithm::kStridedWinograd,
                      name_of(gather_algorithm(v, p.dtype, false)), strided_blocking(p), direct,
                      strided_operations(p, pass), bytes});
  };

  const ConvAlgorithm fprop = gather_algorithm(view, p.dtype, winograd);
  lines += strides_by_winograd(fprop_problem, StridedPass::kFprop, winograd)
               ? strided_line("fprop", StridedPass::kFprop, view)
               : formatted({"fprop", fprop, gather_otherwise(view, p.dtype, fprop),
                            (copies_x    ? kCopies
                             : samples_x ? kSamples
                             : repeats_x ? kRepeats
                                         : words(unfolds_x)) +
                                gather_blocking(view, p.dtype, fprop),
                            direct, gather_operations(view, fprop), bytes});

  if (views.empty()) {
    lines += zeros("dgrad", bytes);
  } else if (const std::optional<ConvAlgorithm> at_once = dgrad_at_once(q)) {
    lines += formatted({"dgrad", *at_once, "",
                        text("all %lld phases of the stride at once, %lld rows of %lld pixels",
                             static_cast<int64_t>(views.size()), p.H, p.W),
                        direct, direct, bytes});
  } else {
    // Where the phases of a stride are computed in several ways, the largest names the way.
    const ConvView& largest =
        *std::max_element(views.begin(), views.end(), [](const ConvView& a, const ConvView& b) {
          return multiplications(a) < multiplications(b);
        });
    const bool pairs = adds_dx && !is_wide(p.dtype);
    const ConvAlgorithm dgrad = pairs ? ConvAlgorithm::kPixelProduct
                                : covers_all && strides_by_groups(q, views)
                                    ? ConvAlgorithm::kGroupTiles
                                    : gather_algorithm(largest, p.dtype, winograd);
    double operations = 0;
    for (const ConvView& v : views)
      operations += gather_operations(v, gather_algorithm(v, p.dtype, winograd));
    const char* const way = turns ? kCopies
                            : strides_by_image(q, views, winograd)
                                ? "by way of a channels_last image: "
                                : "";
    std::string blocking =
        (adds_dx ? "columns that are added up: " : words(folds_dx)) +
        (pairs ? text("register tiles of %lld x %lld, sums of at most %lld terms", kMaxPairRows,
                      kMaxVectors * kLanes<float>, 2 * kDepth)
               : way + gather_blocking(largest, p.dtype, dgrad));
    if (views.size() > 1)
      blocking = std::to_string(views.size()) + " phases of the stride; the largest: " + blocking;
    lines += covers_all && strides_by_winograd(q, StridedPass::kDgrad, winograd)
                 ? strided_line("dgrad", StridedPass::kDgrad, largest)
                 : formatted({"dgrad", dgrad, gather_otherwise(largest, p.dtype, dgrad), blocking,
                              direct, operations, bytes});
  }

  const bool unfolds = wgrad_goes_by_patches(p);
  const bool samples = !unfolds && wgrad_by_samples(p, fprop_view(p), winograd);
  const bool copies = !unfolds && !samples && wgrad_by_channels_last(p, fprop_view(p), winograd);
  const ConvView whole = fprop_view(unfolds   ? patch_problem(p)
                                    : samples ? sample_problem(p)
                                    : copies  ? channels_last_images(p)
                                              : p);
  if (whole.terms() == 0) return lines + zeros("wgrad", bytes);
  const ConvAlgorithm wgrad = wgrad_algorithm(whole, p.dtype, winograd);
  const bool multiplies_padding =
      wgrad == ConvAlgorithm::kBandAlongPixels || wgrad == ConvAlgorithm::kBandAlongChannels ||
      wgrad == ConvAlgorithm::kDepthwisePlanes || wgrad == ConvAlgorithm::kDepthwiseColumns ||
      wgrad == ConvAlgorithm::kGroupTiles || wgrad == ConvAlgorithm::kGroupWinograd ||
      wgrad == ConvAlgorithm::kPairWgrad;
  const char* otherwise = multiplies_padding ? name_of(ConvAlgorithm::kWgradProduct) : "";
  if (wgrad == ConvAlgorithm::kWinograd)
    otherwise = name_of(wgrad_algorithm(whole, p.dtype, false));
  return lines + formatted({"wgrad", wgrad, otherwise,
                            (copies    ? kCopies
                             : samples ? kSamples
                                       : words(unfolds)) +
                                wgrad_blocking(whole, p.dtype, wgrad),
                            direct, wgrad_operations(whole, wgrad), bytes});
}

}  // namespace torchconv::cpu
