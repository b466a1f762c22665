// Convolution of 3x3 kernels with step 1 in exact float32 by Winograd's F(4x4,3x3) and, of the
// weight's gradient, F(3x3,4x4): a quarter of the products. Transforms of the operands, 36 matrix
// products and a transform back, each a launch, go through scratch memory.
//
// Where a sample's sums are infinite or NaN, by its inputs or by overflow, the tiles have spread
// that; then simt_*.cu computes the sample, or the weight's gradient, instead. It is launched in
// any case, as nothing waits for the device, and its blocks end at once where there is nothing to
// do.
#include <algorithm>

#include "core/range.h"
#include "cuda/block_sums.cuh"
#include "cuda/conv_passes.h"
#include "cuda/simt_masked.h"
#include "cuda/winograd.h"
#include "cuda/winograd_gemm.h"
#include "cuda/winograd_tiles.h"

namespace torchconv::cuda {
namespace {

using namespace winograd;

// Transforms are shared by all channels on the other side.
constexpr int64_t kLeastChannels = 32, kLeastPixels = 16;
// What V and M take together at most. Tests on the emulator see several pieces.
#ifdef TORCHCONV_EMULATE_CUDA
constexpr int64_t kMostScratch = int64_t{1} << 20;
#else
constexpr int64_t kMostScratch = int64_t{256} << 20;
#endif

// The cut of one axis: the first tiles have four outputs, the others three.
struct TileAxis {
  int64_t count, full;
  explicit TileAxis(int64_t outputs) : count(ceil_div(outputs, kOutputs)) {
    full = count - std::min(count, kOutputs * count - outputs);
  }
};

// The pieces in which a call goes through the tiles of N samples, each of at most so many: those of
// some samples, or of an image too large for that, whose tiles then have four outputs each way.
class Pieces {
 public:
  // Channels of both sides.
  Pieces(int64_t N, int64_t rows, int64_t columns, int64_t channels)
      : N_(N), rows_(rows), columns_(columns), of_sample_(rows_.count * columns_.count) {
    const int64_t most =
        kMostScratch / (kProducts * static_cast<int64_t>(sizeof(float)) * channels);
    if (of_sample_ > most) {
      tiles_ = std::max<int64_t>(most, 1);
      of_a_sample_ = ceil_div(of_sample_, tiles_);
      tiles_ = ceil_div(of_sample_, of_a_sample_);
      count_ = N * of_a_sample_;
    } else {
      count_ = ceil_div(N, most / of_sample_);
      samples_ = ceil_div(N, count_);
      count_ = ceil_div(N, samples_);
      tiles_ = samples_ * of_sample_;
    }
  }
  int64_t count() const { return count_; }
  int64_t most_tiles() const { return tiles_; }
  // A sample's products by a source and a target channel: a tile of three outputs has one point
  // less.
  int64_t products_of_sample() const {
    if (samples_ == 0) return kProducts * of_sample_;
    const auto points = [](const TileAxis& axis) { return (kPoints - 1) * axis.count + axis.full; };
    return points(rows_) * points(columns_);
  }

  Tiles operator[](int64_t piece) const {
    Tiles t{};
    int64_t samples = 1, first = 0, tall = rows_.count, wide = columns_.count;
    if (samples_ > 0) {
      t.first_sample = piece * samples_;
      samples = std::min(samples_, N_ - t.first_sample);
      tall = rows_.full, wide = columns_.full;
    } else {
      t.first_sample = piece / of_a_sample_;
      first = piece % of_a_sample_ * tiles_;
    }
    const int64_t narrow = columns_.count - wide;
    t.first = static_cast<uint32_t>(first);
    t.ranges.count = static_cast<int>(samples_ > 0 ? samples * of_sample_
                                                   : std::min(tiles_, of_sample_ - first));
    t.ranges.tall_end = t.ranges.wide_end = t.ranges.count;
    if (samples_ > 0) {
      t.ranges.tall_end = static_cast<int>(samples * tall * columns_.count);
      t.ranges.wide_begin = static_cast<int>(samples * tall * narrow);
      t.ranges.wide_end = static_cast<int>(samples * (tall * narrow + rows_.count * wide));
    }
    t.tall = static_cast<int>(tall), t.wide = static_cast<int>(wide);
    const auto divisor = [](int64_t size) { return Divisor(std::max<int64_t>(size, 1)); };
    t.tall_rows = divisor(tall), t.short_rows = divisor(rows_.count - tall);
    t.wide_columns = divisor(wide), t.narrow_columns = divisor(narrow);
    return t;
  }

 private:
  int64_t N_;
  TileAxis rows_, columns_;
  int64_t of_sample_, tiles_, count_;
  int64_t samples_ = 0, of_a_sample_ = 0;  // samples of a piece, or pieces of a sample
};

// The weights by the tap that meets the first row and column of a window.
Weights weights_of(const SimtView& v, const float* w) {
  const SimtPhase &row = v.rows.phase[0], &column = v.columns.phase[0];
  const auto first = [](const SimtPhase& p) {
    return p.source_step > 0 ? p.weight : p.weight + (kTaps - 1) * p.weight_step;
  };
  const auto step = [](const SimtPhase& p) { return p.source_step * p.weight_step; };
  return {w,
          static_cast<int>(v.M),
          static_cast<int>(v.C),
          first(row) * v.weight_row + first(column) * v.weight_column,
          v.weight_m,
          v.weight_c,
          step(row) * v.weight_row,
          step(column) * v.weight_column};
}

int first_source(const SimtPhase& p) {
  return p.source_step > 0 ? p.source : p.source + (kTaps - 1) * p.source_step;
}

// Returns where the samples to compute in another way are marked.
const int* gather(const SimtView& v, const float* source, const float* w,
                  const Epilogue<float>& epilogue, const Queue& queue) {
  const Pieces pieces(v.N, v.rows.most_grid, v.columns.most_grid, v.C + v.M);
  const int64_t width = round_to_quads(v.M), tile_width = round_to_quads(pieces.most_tiles());
  float* const U = queue.scratch<float>(kProducts * v.C * width);
  float* const V = queue.scratch<float>(kProducts * v.C * tile_width);
  float* const M = queue.scratch<float>(kProducts * width * tile_width);
  int* const flags = queue.scratch<int>(v.N);
  transform_weights(weights_of(v, w), U, width, flags, v.N, queue);

  const Image image{source,
                    v.source,
                    static_cast<int>(v.C),
                    v.rows.size,
                    v.columns.size,
                    first_source(v.rows.phase[0]),
                    first_source(v.columns.phase[0])};
  const Target target{v.target, static_cast<int>(v.M), v.rows.most_grid, v.columns.most_grid};
  Gemm gemm{};
  gemm.a = U, gemm.b = V, gemm.out = M;
  gemm.M = target.channels, gemm.terms = image.channels;
  gemm.a_width = static_cast<int>(width), gemm.b_width = static_cast<int>(tile_width);
  gemm.a_point = v.C * width, gemm.b_point = v.C * tile_width;
  gemm.along_m = v.target.c == 1;
  gemm.out_width = gemm.along_m ? gemm.a_width : gemm.b_width;
  gemm.out_point = width * tile_width;
  const Panels products{M, gemm.out_point, gemm.along_m ? 1 : tile_width, gemm.along_m ? width : 1};
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const Tiles tiles = pieces[piece];
    transform_sources(image, tiles, false, {V, v.C * tile_width, tile_width, 1}, queue);
    gemm.N = tiles.ranges.count, gemm.tiles = tiles.ranges;
    multiply(gemm, queue);
    transform_outputs(products, tiles, target, epilogue, flags, queue);
  }
  return flags;
}

}  // namespace

bool winograd_takes(const ConvProblem& p, Pass, const Queue& queue) {
  return queue.capability >= 80 && p.dtype == DType::kFloat32 && p.groups == 1 && p.R == kTaps &&
         p.S == kTaps && p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 &&
         p.dilation_w == 1 && std::min(p.C, p.K) >= kLeastChannels && p.P * p.Q >= kLeastPixels &&
         simt_fits(p) && p.C * p.K < kSimtLimit / 4 && p.N * p.P * p.Q < kSimtLimit * 4 &&
         p.N * p.H * p.W < kSimtLimit * 4;
}

double winograd_operations(const ConvProblem& p, Pass pass) {
  const bool dgrad = pass == Pass::kDgrad;
  const Pieces pieces(p.N, dgrad ? p.H : p.P, dgrad ? p.W : p.Q, p.C + p.K);
  return 2.0 * static_cast<double>(p.N * pieces.products_of_sample()) *
         static_cast<double>(p.C * p.K);
}

void winograd_fprop(const ConvProblem& p, const void* x, const void* w, const void* bias,
                    const void* residual, void* y, void* preactivation, const Queue& queue) {
  if (p.N * p.K * p.P * p.Q == 0) return;
  const int* samples = gather(
      fprop_view(p), static_cast<const float*>(x), static_cast<const float*>(w),
      {static_cast<const float*>(bias), static_cast<float*>(y), static_cast<float*>(preactivation),
       p.activation, static_cast<const float*>(residual)},
      queue);
  simt_fprop_of(samples, p, x, w, bias, residual, y, preactivation, queue);
}

void winograd_dgrad(const ConvProblem& p, const void* dz, const void* w, void* dx,
                    const Queue& queue) {
  if (p.N * p.C * p.H * p.W == 0) return;
  const int* samples =
      gather(dgrad_view(p, 0, 0), static_cast<const float*>(dz), static_cast<const float*>(w),
             {nullptr, static_cast<float*>(dx), nullptr, Activation::kNone}, queue);
  simt_dgrad_of(samples, p, dz, w, dx, queue);
}

void winograd_wgrad(const ConvProblem& p, const void* dz, const void* x, void* dw,
                    const Queue& queue) {
  const Pieces pieces(p.N, p.P, p.Q, p.C + p.K);
  const int64_t c_width = round_to_quads(p.C), k_width = round_to_quads(p.K);
  const int64_t most = pieces.most_tiles();
  float* const V = queue.scratch<float>(kProducts * most * c_width);
  float* const Z = queue.scratch<float>(kProducts * most * k_width);
  int* const flag = queue.scratch<int>(1);

  Gemm gemm{};
  gemm.a = Z, gemm.b = V;
  gemm.M = static_cast<int>(p.K), gemm.N = static_cast<int>(p.C);
  gemm.a_width = static_cast<int>(k_width), gemm.b_width = static_cast<int>(c_width);
  gemm.a_point = most * k_width, gemm.b_point = most * c_width;
  gemm.out_width = gemm.b_width;
  gemm.out_point = p.K * c_width, gemm.out_slice = kProducts * gemm.out_point;
  gemm.tiles_are_terms = true;
  gemm.slices = static_cast<int>(slices_of(p.K, p.C, most));
  // Of several pieces the sums so far are the first slice.
  const bool several = pieces.count() > 1;
  float* const sums = queue.scratch<float>((gemm.slices + (several ? 1 : 0)) * gemm.out_slice);
  gemm.out = several ? sums + gemm.out_slice : sums;
  WeightGradient gradient{};
  gradient.slice = gemm.out_slice, gradient.point = gemm.out_point, gradient.width = c_width;
  gradient.slices = several ? 1 : gemm.slices;
  gradient.sums = sums;
  gradient.K = gemm.M, gradient.C = gemm.N;
  gradient.flip = p.flip;
  gradient.strides = weight_strides(p);
  gradient.dw = static_cast<float*>(dw);

  const Image image{static_cast<const float*>(x),
                    image_strides(p.layout, p.C, p.H, p.W),
                    gradient.C,
                    static_cast<int>(p.H),
                    static_cast<int>(p.W),
                    static_cast<int>(-p.pad_top),
                    static_cast<int>(-p.pad_left)};
  const Image gradients{static_cast<const float*>(dz),
                        image_strides(p.layout, p.K, p.P, p.Q),
                        gradient.K,
                        static_cast<int>(p.P),
                        static_cast<int>(p.Q),
                        0,
                        0};
  for (int64_t piece = 0; piece < pieces.count(); ++piece) {
    const Tiles tiles = pieces[piece];
    transform_sources(image, tiles, true, {V, gemm.b_point, 1, c_width}, queue);
    transform_gradients(gradients, tiles, {Z, gemm.a_point, 1, k_width}, flag, queue);
    gemm.tiles = tiles.ranges;
    multiply(gemm, queue);
    const bool first = piece == 0;
    if (several)
      add_slices(SliceSums<float>{sums, first ? gemm.out : sums, gemm.out_slice},
                 gemm.slices + (first ? 0 : 1), queue);
  }
  transform_weight_gradients(gradient, flag, queue);
  simt_wgrad_if(flag, p, dz, x, dw, queue);
}

}  // namespace torchconv::cuda
