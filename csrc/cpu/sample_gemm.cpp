// fprop and dgrad of images of a single pixel: the fully connected layers of a network that is
// convolutional to its end, and those of squeeze and excitation (Hu et al., arXiv 1709.01507).
// Every weight meets each sample once, so that with few samples packing the weights would take
// longer than all products. They are read where they lie: by inner products where channels are
// neighbours, as in fprop (microkernels/inner_product.h), and where filters are, as in dgrad, by
// the product whose columns keep any distance (microkernels/pixel_product.h).
//
// A task owns some samples and filters, whose sums begin with the bias and wait in scratch; blocks
// of terms come outermost, so that what all samples read of the weights stays in cache. Of narrower
// types a tile's weights are converted just before all samples meet them, in the first-level cache:
// a packed copy would be read, written and read again, twice as large.
#include "cpu/sample_gemm.h"

#include <algorithm>

#include "core/buffer.h"
#include "cpu/conv_pack.h"
#include "cpu/microkernels/inner_product.h"
#include "cpu/microkernels/pixel_product.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

constexpr int64_t kSamples = 48;
// Filters of a task whose terms are neighbours, and terms summed in a lane before sums go to memory
// (see kDepth in microkernels/gemm.h).
constexpr int64_t kFiltersApart = 48, kTermsOfLane = 128;
// The same where the weights of a tile are converted: these lie in the first-level cache.
constexpr int64_t kTermsOfLaneConverted = 32;
// Terms of all samples together that stay in the second-level cache.
constexpr int64_t kSourceTerms = 1 << 15;
// Filters of a task where those are neighbours: pieces of rows long enough to be worth a page.
constexpr int64_t kFiltersTogether = 256, kFiltersTogetherConverted = 512;
// Bytes from a weight to the one that is asked for meanwhile, at least: what the last-level cache
// takes to answer. Of more weights most come from memory, which the hardware foresees better.
constexpr int64_t kAheadBytes = 8 << 10, kMostAskedFor = 12 << 20;
// Reading a weight takes as long as so many products.
constexpr int64_t kWeightOperations = 8;

template <typename T>
class SampleGemm {
 public:
  using A = Wide<T>;
  static constexpr int64_t kL = Vec<A>::kLanes, kStrip = kProductVectors * kL;

  // src: the pixel of every sample, `step` apart.
  SampleGemm(const ConvView& view, const A* src, int64_t step, const T* w, const T* bias,
             const Epilogue<T>& epilogue)
      : view_(view),
        src_(src),
        step_(step),
        w_(w + view.taps[0].weight),
        bias_(bias),
        epilogue_(epilogue),
        apart_(view.weight_c == 1),
        filters_(apart_      ? kFiltersApart
                 : kConverts ? kFiltersTogetherConverted
                             : kFiltersTogether) {}

  void run(const Parallel& pool) {
    const int64_t blocks = ceil_div(view_.K, filters_);
    const int64_t sums_size = kSamples * (filters_ + kL);
    const int64_t size = sums_size + kConverted;
    const WorkSplit split(ceil_div(view_.N, kSamples) * blocks,
                          static_cast<double>(std::min(view_.N, kSamples) + kWeightOperations) *
                              static_cast<double>(std::min(view_.K, filters_) * view_.C));
    Buffer<A> scratch(split.slots * size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / blocks * kSamples, k = task % blocks * filters_;
        const Range samples{n, std::min(n + kSamples, view_.N)};
        const Range filters{k, std::min(k + filters_, view_.K)};
        A* sums = scratch.get() + slot * size;
        if (apart_)
          sum_lanes(samples, filters, sums, sums + sums_size);
        else
          sum_rows(samples, filters, sums, sums + sums_size);
      }
    });
  }

 private:
  static constexpr bool kConverts = !std::is_same_v<T, A>;
  static constexpr int64_t kLaneTerms = (kConverts ? kTermsOfLaneConverted : kTermsOfLane) * kL;
  // Elements of what is converted at once. Rows of filters fall into different cache sets.
  static constexpr int64_t kConvertedRow = kFiltersTogetherConverted + kL;
  static constexpr int64_t kConverted =
      kConverts ? std::max(kInnerFilters * kLaneTerms, kSampleRows* kConvertedRow) : 0;

  struct Weights {
    const A* at;
    int64_t step;
  };
  // `count` rows of `size` weights, `step` apart: where they lie, or converted to rows of
  // `converted_step`, while as much `ahead` of them is fetched.
  static Weights weights(const T* w, int64_t step, int64_t count, int64_t size,
                         [[maybe_unused]] int64_t ahead, [[maybe_unused]] A* converted,
                         [[maybe_unused]] int64_t converted_step) {
    if constexpr (kConverts) {
      constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
      for (int64_t i = 0; i < count; ++i, w += step) {
        for (int64_t l = 0; l < size; l += kLine) __builtin_prefetch(w + ahead + l);
        copy_wide(converted + i * converted_step, w, size);
      }
      return {converted, converted_step};
    } else {
      return {w, step};
    }
  }

  // Terms along the lanes.
  void sum_lanes(Range samples, Range filters, A* sums, A* converted) const {
    for (int64_t n = 0; n < samples.size(); ++n)
      for (int64_t k = 0; k < filters.size(); ++k)
        sums[n * filters_ + k] = bias_ != nullptr ? to_wide(bias_[filters.begin + k]) : A{0};
    const int64_t pieces = ceil_div(filters.size(), kInnerFilters);
    // As many terms of few samples stay in cache that a filter's weights are read on and on.
    const int64_t block = round_up(ceil_div(kSourceTerms, samples.size()), kLaneTerms);
    for (int64_t c = 0; c < view_.C; c += block)
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t k = piece * filters.size() / pieces;
        const int64_t count = (piece + 1) * filters.size() / pieces - k;
        for (int64_t at = c; at < std::min(c + block, view_.C); at += kLaneTerms)
          sum_piece(samples, {filters.begin + k, filters.begin + k + count},
                    {at, std::min(at + kLaneTerms, view_.C)}, sums + k, converted);
      }
    for (int64_t n = 0; n < samples.size(); ++n)
      epilogue_.store(sums + n * filters_, filters.size(), dst(samples.begin + n) + filters.begin,
                      1);
  }

  // At most kInnerFilters filters.
  void sum_piece(Range samples, Range filters, Range terms, A* sums, A* converted) const {
    const Weights w = weights(w_ + filters.begin * view_.weight_k + terms.begin, view_.weight_k,
                              filters.size(), terms.size(), terms.size(), converted, kLaneTerms);
    const TermRun run{0, 0, terms.size()};
    InnerTile<A> tile{};
    tile.step = step_;
    tile.runs = &run;
    tile.run_count = 1;
    tile.w = w.at;
    tile.filter_step = w.step;
    constexpr int64_t kSize = sizeof(A);
    if (!kConverts && view_.K * view_.C * kSize <= kMostAskedFor)
      tile.ahead = std::max(filters.size() * w.step, kAheadBytes / kSize);
    tile.out_pixel = filters_;
    for (int64_t n = 0; n < samples.size();) {
      const int64_t now = inner_tile_pixels(samples.size() - n, filters.size());
      tile.src = src_ + (samples.begin + n) * step_ + terms.begin;
      tile.out = sums + n * filters_;
      inner_microkernel<A>(now, filters.size())(tile);
      n += now;
    }
  }

  // Filters along the lanes. The last vector of filters ends with them, and has sums of its own.
  void sum_rows(Range samples, Range filters, A* sums, A* converted) const {
    const int64_t ld = filters_ + kL, whole = filters.size() / kL * kL;
    const int64_t left = filters.size() - whole, last = filters.end - kL;
    for (int64_t n = 0; n < samples.size(); ++n)
      for (int64_t k = 0; k < whole + kL; ++k) {
        const int64_t filter = k < whole ? filters.begin + k : last + k - whole;
        sums[n * ld + k] = bias_ != nullptr ? to_wide(bias_[filter]) : A{0};
      }
    // Their weights begin before those of the task's first where it has no other vector.
    const int64_t first = std::min(filters.begin, last);
    for (int64_t c = 0; c < view_.C; c += kSampleRows) {
      const Range terms{c, std::min(c + kSampleRows, view_.C)};
      const Weights w =
          weights(w_ + weight(c, first), view_.weight_c, terms.size(), filters.end - first,
                  terms.size() * view_.weight_c, converted, kConvertedRow);
      const auto sum = [&](int64_t filter, int64_t width, int64_t next, A* to) {
        sum_strip(samples, terms, {w.at + filter - first, w.step}, width, next, to);
      };
      for (int64_t k = 0; k < whole; k += kStrip) {
        const bool more = k + kStrip < whole + std::min<int64_t>(left, 1);
        sum(filters.begin + k, std::min(kStrip, whole - k),
            more ? weight(c, filters.begin + k + kStrip) : weight(terms.end, filters.begin),
            sums + k);
      }
      if (left > 0) sum(last, kL, weight(terms.end, filters.begin), sums + whole);
    }
    for (int64_t n = 0; n < samples.size(); ++n) {
      const int64_t to = dst(samples.begin + n) + filters.begin;
      epilogue_.store(sums + n * ld, whole, to, 1);
      if (left > 0) epilogue_.store(sums + n * ld + whole + kL - left, left, to + whole, 1);
    }
  }

  // next: of the weights of the strip to come, which are fetched meanwhile unless converted.
  void sum_strip(Range samples, Range terms, Weights w, int64_t width, int64_t next,
                 A* sums) const {
    const int64_t ld = filters_ + kL;
    const ProductRun run{0, 0, terms.size()};
    const void* fetch[kSampleRows];
    auto line = reinterpret_cast<uintptr_t>(w_) + static_cast<uintptr_t>(next) * sizeof(T);
    for (int64_t c = 0; c < terms.size(); ++c) {
      fetch[c] = kConverts ? sums : reinterpret_cast<const void*>(line);
      if (kConverts) continue;
      for (int64_t v = 1; v < kProductVectors; ++v)
        __builtin_prefetch(
            reinterpret_cast<const void*>(line + static_cast<uintptr_t>(v) * kVectorBytes));
      line += static_cast<uintptr_t>(view_.weight_c) * sizeof(T);
    }
    PixelProduct<A> tile{};
    tile.columns = w.at;
    tile.row_step = 1;
    tile.column_step = w.step;
    tile.runs = &run;
    tile.run_count = 1;
    tile.sum_stride = ld;
    tile.accumulate = true;
    tile.fetch = fetch;
    const int64_t tiles = ceil_div(samples.size(), int64_t{kProductRows});
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t n = t * samples.size() / tiles, rows = (t + 1) * samples.size() / tiles - n;
      for (int64_t m = 0; m < rows; ++m)
        tile.rows[m] = src_ + (samples.begin + n + m) * step_ + terms.begin;
      tile.sum = sums + n * ld;
      pixel_product_kernel<A>(rows, width / kL)(tile);
    }
  }

  int64_t weight(int64_t c, int64_t k) const { return c * view_.weight_c + k; }
  int64_t dst(int64_t n) const { return view_.dst_offset + n * view_.dst.n; }

  const ConvView& view_;
  const A* src_;
  const int64_t step_;
  const T* w_;
  const T* bias_;
  const Epilogue<T>& epilogue_;
  const bool apart_;  // filters, whose terms are neighbours
  const int64_t filters_;
};

}  // namespace

bool sample_gemm_applies(const ConvView& view) {
  if (view.groups != 1 || view.taps.size() != 1 || view.pixels() != 1 || view.src.c != 1 ||
      view.dst.c != 1)
    return false;
  return view.weight_c == 1 || (view.weight_k == 1 && view.K >= kVectorBytes / 4);
}

template <typename T>
void sample_gemm(const ConvView& view, const T* src, const T* w, const T* bias,
                 const Epilogue<T>& epilogue, const Parallel& pool) {
  const T* pixel = src + view.taps[0].h * view.src.row + view.taps[0].w * view.src.column;
  if constexpr (std::is_same_v<T, Wide<T>>) {
    SampleGemm<T>(view, pixel, view.src.n, w, bias, epilogue).run(pool);
  } else {
    const Buffer<Wide<T>> pixels(view.N * view.C);
    const WorkSplit split(view.N, static_cast<double>(view.C));
    split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
      for (int64_t n = begin; n < end; ++n)
        copy_wide(pixels.get() + n * view.C, pixel + n * view.src.n, view.C);
    });
    SampleGemm<T>(view, pixels.get(), view.C, w, bias, epilogue).run(pool);
  }
}

template void sample_gemm(const ConvView&, const float*, const float*, const float*,
                          const Epilogue<float>&, const Parallel&);
template void sample_gemm(const ConvView&, const double*, const double*, const double*,
                          const Epilogue<double>&, const Parallel&);
template void sample_gemm(const ConvView&, const BFloat16*, const BFloat16*, const BFloat16*,
                          const Epilogue<BFloat16>&, const Parallel&);
template void sample_gemm(const ConvView&, const Float16*, const Float16*, const Float16*,
                          const Epilogue<Float16>&, const Parallel&);

}  // namespace torchconv::cpu
