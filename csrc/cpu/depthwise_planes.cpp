// NCHW depthwise convolution: planes, or bands of their rows, are dealt to threads; consecutive
// planes are neighbours in memory and go through the kernels together. Narrow types are converted
// in cache-sized scratch, and so is what more than an activation is still to be applied to.
#include "cpu/depthwise_planes.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/depthwise_taps.h"
#include "cpu/microkernels/plane_rows.h"
#include "cpu/microkernels/plane_rows_steps.h"
#include "cpu/microkernels/plane_rows_winograd.h"
#include "cpu/parallel_range.h"
#include "cpu/processor.h"

namespace torchconv::cpu {
namespace {

// Elements of a plane or band, and of neighbouring planes, that are worked on at a time.
constexpr int64_t kTogether = 8192, kBand = 16384;
// Of those that are converted, for copies and sums in the first cache.
constexpr int64_t kConverted = 4096;

// Planes that are worth minimal filtering.
constexpr int64_t kLeastWinogradRows = 4, kLeastWinogradColumns = 9;

// Output rows [first, last) of dst planes [plane, plane + planes) of sample n.
struct Piece {
  int64_t n, plane, planes, first, last;
};

// Source rows that output rows [first, last) read, of those that exist.
Range source_rows(const DepthwiseTaps& taps, const ConvView& v, int64_t first, int64_t last) {
  const int64_t begin = first * v.step_h + taps.first_h;
  const int64_t end = (last - 1) * v.step_h + taps.first_h + (taps.rows - 1) * taps.gap_h + 1;
  return {std::clamp<int64_t>(begin, 0, v.H), std::clamp<int64_t>(end, 0, v.H)};
}

Range source_rows(const ConvProblem& p, int64_t first, int64_t last) {
  return {std::clamp<int64_t>(floor_div(first + p.pad_top - (p.R - 1), 2), 0, p.P),
          std::clamp<int64_t>(floor_div(last - 1 + p.pad_top, 2) + 1, 0, p.P)};
}

template <typename T>
class DepthwisePlanes {
 public:
  using A = Wide<T>;
  static constexpr bool kConverts = !std::is_same_v<T, A>;

  // Planes of src have `height` x `width`, those of dst I x J; `filters` dst planes share a src
  // plane.
  struct Sizes {
    int64_t N, planes, filters, height, width, I, J, src_n, dst_n;
    bool whole;  // no bands
  };

  DepthwisePlanes(const DepthwiseTaps& taps, const Sizes& sizes) : taps_(taps), s_(sizes) {
    const int64_t plane = std::max(s_.height * s_.width, s_.I * s_.J);
    together_ = s_.filters > 1 ? s_.filters
                               : std::clamp<int64_t>((kConverts ? kConverted : kTogether) / plane,
                                                     1, s_.planes);
    bands_ = s_.whole || together_ > 1
                 ? 1
                 : std::clamp<int64_t>(plane / (kConverts ? kConverted : kBand), 1, s_.I);
    band_ = ceil_div(s_.I, bands_);
    bands_ = ceil_div(s_.I, band_);
  }

  // rows_of(first, last): the source rows of a piece. call(sum, piece) runs the kernels on sum,
  // where everything but the geometry is filled in.
  template <typename Rows, typename Call>
  void run(const T* src, const T* w, const T* bias, const Epilogue<T>& epilogue,
           const Parallel& pool, Rows&& rows_of, Call&& call) const {
    const int64_t chunks = ceil_div(s_.planes, together_);
    const int64_t taps = taps_.rows * taps_.rows;
    const bool in_place = !kConverts && epilogue.activates_only();
    int64_t most_rows = 0;
    for (int64_t first = 0; first < s_.I; first += band_)
      most_rows = std::max(most_rows, rows_of(first, std::min(first + band_, s_.I)).size());
    const int64_t src_size = kConverts ? together_ * most_rows * s_.width : 0;
    const int64_t dst_size = in_place ? 0 : together_ * band_ * s_.J;
    const int64_t filter = taps_.filter, weights_size = kConverts ? together_ * (filter + 1) : 0;
    const int64_t slot_size = round_up(src_size + 16, 16) + round_up(dst_size, 16) + weights_size;
    const WorkSplit split(s_.N * chunks * bands_,
                          static_cast<double>(together_ * band_ * s_.J * (taps + 8)));
    Buffer<A> scratch(in_place ? 0 : split.slots * slot_size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      A* copies = in_place ? nullptr : scratch.get() + slot * slot_size;
      A* sums = copies + (in_place ? 0 : round_up(src_size + 16, 16));
      A* weights = sums + (in_place ? 0 : round_up(dst_size, 16));
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % bands_ * band_, plane = item / bands_ % chunks * together_;
        const Piece piece{item / (bands_ * chunks), plane, std::min(together_, s_.planes - plane),
                          first, std::min(first + band_, s_.I)};
        const int64_t dst = piece.n * s_.dst_n + plane * s_.I * s_.J + first * s_.J;
        const T* from = src + piece.n * s_.src_n + plane / s_.filters * s_.height * s_.width;
        const Range rows = rows_of(piece.first, piece.last);
        PlaneRowsSum<A> sum;
        sum.planes = piece.planes;
        sum.first = piece.first;
        sum.last = piece.last;
        sum.out_pitch = s_.J;
        sum.ahead =
            kConverts ? 0 : fetch_distance<A>(s_.N * (s_.src_n + s_.dst_n), s_.height, s_.width);
        sum.streams = false;
        sum.clamps = in_place && epilogue.clamps();
        sum.most = epilogue.most();
        sum.weight_plane = filter;
        sum.weight_row = taps_.weight_row;
        sum.weight_column = taps_.weight_column;
        if constexpr (kConverts) {
          const int64_t sources = s_.filters > 1 ? 1 : piece.planes;
          const int64_t count = rows.size() * s_.width;
          if (rows.size() == s_.height)
            copy_wide(copies, from, sources * count);
          else
            for (int64_t c = 0; c < sources; ++c)
              copy_wide(copies + c * count, from + c * s_.height * s_.width + rows.begin * s_.width,
                        count);
          // Filters as they lie in memory.
          A* const biases = weights + together_ * filter;
          copy_wide(weights, w + plane * filter, piece.planes * filter);
          if (bias != nullptr) copy_wide(biases, bias + plane, piece.planes);
          sum.src_plane = s_.filters > 1 ? 0 : count;
          sum.weights = weights + taps_.weight(0, 0);
          sum.bias = bias != nullptr ? biases : nullptr;
          sum.src = copies - rows.begin * s_.width;
        } else {
          sum.src_plane = s_.filters > 1 ? 0 : s_.height * s_.width;
          sum.weights = w + plane * filter + taps_.weight(0, 0);
          sum.bias = bias != nullptr ? bias + plane : nullptr;
          sum.src = from;
        }
        const int64_t count = (piece.last - first) * s_.J;
        if constexpr (!kConverts) {
          if (in_place) {
            sum.out = epilogue.y + dst - first * s_.J;
            sum.out_plane = s_.I * s_.J;
            sum.streams = epilogue.activation == Activation::kNone &&
                          WideVec<T>::streams(epilogue.y, s_.N * s_.dst_n, s_.J);
            call(sum, piece);
            if (!epilogue.clamps_at_most())
              activate(epilogue.activation, epilogue.y + dst, epilogue.y + dst,
                       piece.planes * count);
            continue;
          }
        }
        sum.out = sums - first * s_.J;
        sum.out_plane = count;
        call(sum, piece);
        epilogue.store(sums, piece.planes * count, dst, 1);
      }
    });
  }

 private:
  const DepthwiseTaps& taps_;
  Sizes s_;
  int64_t together_, bands_, band_;
};

}  // namespace

bool depthwise_planes_rolls(const ConvView& v) {
  if (!depthwise_planes_applies(v)) return false;
  const int64_t R = DepthwiseTaps(v).rows;
  return (R == 3 || R == 5 || R == 7) && (v.step_h == 1 || (v.step_h == 2 && R < 7));
}

bool depthwise_planes_wgrad_applies(const ConvView& v) {
  if (!depthwise_planes_applies(v)) return false;
  const int64_t R = DepthwiseTaps(v).rows;
  return depthwise_planes_rolls(v) || R * ceil_div(R, v.step_w) <= kMostStepsTerms;
}

bool depthwise_planes_applies(const ConvView& v) {
  const DepthwiseTaps taps(v);
  const int64_t R = taps.rows;
  const bool square = taps.regular && R == taps.columns;
  const bool dilated = taps.gap_h > 1 || taps.gap_w > 1;
  const bool steps =
      R > 1 && R <= kMostStepsRows && v.step_h == v.step_w && v.step_h <= kMostLaneStep;
  const bool rolls = (R == 3 || R == 5 || R == 7) && v.step_h == 1 && v.step_w == 1;
  // With channels innermost in the weights, a group's filters are not as far apart as groups are.
  const bool even = v.K == 1 || v.weight_group == v.K * v.weight_k;
  return v.C == 1 && even && v.src.column == 1 && v.src.row == v.W && v.src.c == v.H * v.W &&
         v.dst_pixels_contiguous() && v.dst.c == v.pixels() && square && (dilated ? rolls : steps);
}

template <typename T>
void depthwise_planes_gather(const ConvView& v, const T* src, const T* w, const T* bias,
                             const Epilogue<T>& epilogue, const Parallel& pool) {
  const DepthwiseTaps taps(v);
  const DepthwisePlanes<T> planes(
      taps, {v.N, v.groups * v.K, v.K, v.H, v.W, v.I, v.J, v.src.n, v.dst.n, taps.gap_h > 1});
  planes.run(
      src, w, bias, epilogue.at(v.dst_offset), pool,
      [&](int64_t first, int64_t last) { return source_rows(taps, v, first, last); },
      [&](const PlaneRowsSum<Wide<T>>& sum, const Piece&) {
        for_plane_rows(taps, v, [&](const PlaneRows& shape, int64_t row, int64_t rows) {
          PlaneRowsSum<Wide<T>> part = sum;
          part.src += (row + taps.first_h) * v.W + taps.first_w;
          part.out += row * v.J;
          part.out_pitch *= taps.gap_h;
          if (taps.gap_h > 1) {
            part.first = 0;
            part.last = rows;
          }
          plane_rows_sum(shape, part);
        });
      });
}

bool depthwise_planes_winograd_applies(const ConvView& v) {
  // Two vectors a cycle are more than the loads of its weights keep up with, and the direct sums
  // take as long or less.
  static const bool halves = halves_wide_vectors();
  if (!kFiltersColumns || !halves || !depthwise_planes_rolls(v) || v.step_h != 1) return false;
  const DepthwiseTaps taps(v);
  if (taps.rows == 3 || taps.gap_h != 1 || taps.gap_w != 1 || taps.first_w > 0 ||
      taps.first_w <= -taps.rows || v.J + taps.first_w > v.W || v.W > kMostWinogradColumns ||
      v.I < kLeastWinogradRows || v.J < kLeastWinogradColumns)
    return false;
  // Outputs come late in a vector: rows that fill theirs take another, which eats up what 5 columns
  // save. In one vector the direct kernel of 5 holds all weights and is as fast.
  const int64_t last = v.J + taps.rows - 1 + taps.first_w, kL = kLanes<float>;
  return taps.rows == 7 || (v.J > kL && ceil_div(last, kL) == ceil_div(v.J, kL));
}

std::vector<int64_t> depthwise_planes_winograd(const ConvView& v, const float* src, const float* w,
                                               const float* bias, const Epilogue<float>& epilogue,
                                               const Parallel& pool) {
  const DepthwiseTaps taps(v);
  const int64_t filters = v.groups * v.K, size = winograd_column_products(taps.rows) * taps.rows;
  Buffer<float> weights(filters * size + kLanes<float>);
  for (int64_t k = 0; k < filters; ++k)
    plane_rows_weights(taps.rows, w + k * taps.filter + taps.weight(0, 0), taps.weight_row,
                       taps.weight_column, weights.get() + k * size);
  const DepthwisePlanes<float> planes(
      taps, {v.N, filters, v.K, v.H, v.W, v.I, v.J, v.src.n, v.dst.n, false});
  const std::unique_ptr<std::atomic<bool>[]> special(
      new std::atomic<bool>[static_cast<size_t>(v.N)]());
  planes.run(
      src, w, bias, epilogue.at(v.dst_offset), pool,
      [&](int64_t first, int64_t last) { return source_rows(taps, v, first, last); },
      [&](const PlaneRowsSum<float>& sum, const Piece& piece) {
        for_plane_rows(taps, v, [&](const PlaneRows& shape, int64_t, int64_t) {
          PlaneRowsWinograd part{sum, src + (v.N - 1) * v.src.n + v.groups * v.src.c};
          part.sum.src += taps.first_h * v.W + taps.first_w;
          part.sum.weights = weights.get() + piece.plane * size;
          part.sum.weight_plane = size;
          if (!plane_rows_winograd(shape, part))
            special[static_cast<size_t>(piece.n)].store(true, std::memory_order_relaxed);
        });
      });
  std::vector<int64_t> samples;
  for (int64_t n = 0; n < v.N; ++n)
    if (special[static_cast<size_t>(n)].load(std::memory_order_relaxed)) samples.push_back(n);
  return samples;
}

bool depthwise_planes_spread_applies(const ConvProblem& p) {
  return p.layout == Layout::kNCHW && p.pad_left % 2 == p.R / 2 % 2 && depthwise_spreads(p);
}

template <typename T>
void depthwise_planes_spread(const ConvProblem& p, const T* dz, const T* w, T* dx,
                             const Parallel& pool) {
  const DepthwiseTaps taps = DepthwiseTaps::of(p);
  const PlaneRows shape{p.R, PlaneRows::kSpread, p.Q,        1,  0, p.P, 0,
                        p.Q, p.pad_top,          p.pad_left, p.W};
  const DepthwisePlanes<T> planes(
      taps, {p.N, p.C, 1, p.P, p.Q, p.H, p.W, p.C * p.P * p.Q, p.C * p.H * p.W, false});
  planes.run(
      dz, w, nullptr, Epilogue<T>{dx, nullptr, Activation::kNone}, pool,
      [&](int64_t first, int64_t last) { return source_rows(p, first, last); },
      [&](const PlaneRowsSum<Wide<T>>& sum, const Piece&) { plane_rows_sum(shape, sum); });
}

#define TORCHCONV_DEPTHWISE_PLANES(T)                                                  \
  template void depthwise_planes_gather(const ConvView&, const T*, const T*, const T*, \
                                        const Epilogue<T>&, const Parallel&);          \
  template void depthwise_planes_spread(const ConvProblem&, const T*, const T*, T*,    \
                                        const Parallel&);
TORCHCONV_DEPTHWISE_PLANES(float)
TORCHCONV_DEPTHWISE_PLANES(double)
TORCHCONV_DEPTHWISE_PLANES(BFloat16)
TORCHCONV_DEPTHWISE_PLANES(Float16)
#undef TORCHCONV_DEPTHWISE_PLANES

}  // namespace torchconv::cpu
