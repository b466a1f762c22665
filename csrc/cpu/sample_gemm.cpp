// fprop and dgrad of images of a single pixel: the fully connected layers of a network that is
// convolutional to its end, and those of squeeze and excitation (Hu et al., arXiv 1709.01507).
// Every weight meets each sample once, so that with few samples packing the weights would take
// longer than all products. They are read where they lie: by inner products where channels are
// neighbours, as in fprop (microkernels/inner_product.h), and where filters are, as in dgrad, by
// the product whose columns keep any distance (microkernels/pixel_product.h).
//
// A task owns some samples and filters, whose sums begin with the bias and wait in scratch; blocks
// of terms come outermost, so that what all samples read of the weights stays in cache.
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
// Filters of a task where those are neighbours: pieces of rows long enough to be worth a page.
constexpr int64_t kFiltersTogether = 256;
// Reading a weight takes as long as so many products.
constexpr int64_t kWeightOperations = 8;

template <typename T>
class SampleGemm {
 public:
  static constexpr int64_t kL = Vec<T>::kLanes, kStrip = kProductVectors * kL;

  SampleGemm(const ConvView& view, const T* src, const T* w, const T* bias,
             const Epilogue<T>& epilogue)
      : view_(view),
        src_(src + view.taps[0].h * view.src.row + view.taps[0].w * view.src.column),
        w_(w + view.taps[0].weight),
        bias_(bias),
        epilogue_(epilogue),
        apart_(view.weight_c == 1),
        filters_(apart_ ? kFiltersApart : kFiltersTogether) {}

  void run(const Parallel& pool) {
    const int64_t blocks = ceil_div(view_.K, filters_);
    const int64_t size = kSamples * (filters_ + kL);
    const WorkSplit split(ceil_div(view_.N, kSamples) * blocks,
                          static_cast<double>(std::min(view_.N, kSamples) + kWeightOperations) *
                              static_cast<double>(std::min(view_.K, filters_) * view_.C));
    Buffer<T> scratch(split.slots * size);
    split.run(pool, [&](int64_t begin, int64_t end, int64_t slot) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / blocks * kSamples, k = task % blocks * filters_;
        const Range samples{n, std::min(n + kSamples, view_.N)};
        const Range filters{k, std::min(k + filters_, view_.K)};
        T* sums = scratch.get() + slot * size;
        if (apart_)
          sum_lanes(samples, filters, sums);
        else
          sum_rows(samples, filters, sums);
      }
    });
  }

 private:
  // Terms along the lanes.
  void sum_lanes(Range samples, Range filters, T* sums) const {
    for (int64_t n = 0; n < samples.size(); ++n)
      for (int64_t k = 0; k < filters.size(); ++k)
        sums[n * filters_ + k] = bias_ != nullptr ? bias_[filters.begin + k] : T{0};
    const int64_t pieces = ceil_div(filters.size(), kInnerFilters);
    for (int64_t c = 0; c < view_.C; c += kTermsOfLane * kL) {
      const TermRun run{c, c, std::min(view_.C - c, kTermsOfLane * kL)};
      InnerTile<T> tile{};
      tile.step = view_.src.n;
      tile.runs = &run;
      tile.run_count = 1;
      tile.filter_step = view_.weight_k;
      tile.out_pixel = filters_;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t k = piece * filters.size() / pieces;
        const int64_t count = (piece + 1) * filters.size() / pieces - k;
        tile.w = w_ + (filters.begin + k) * view_.weight_k;
        for (int64_t n = 0; n < samples.size();) {
          const int64_t now = inner_tile_pixels(samples.size() - n, count);
          tile.src = src_ + (samples.begin + n) * view_.src.n;
          tile.out = sums + n * filters_ + k;
          inner_microkernel<T>(now, count)(tile);
          n += now;
        }
      }
    }
    for (int64_t n = 0; n < samples.size(); ++n)
      epilogue_.store(sums + n * filters_, filters.size(), dst(samples.begin + n) + filters.begin,
                      1);
  }

  // Filters along the lanes. The last vector of filters ends with them, and has sums of its own.
  void sum_rows(Range samples, Range filters, T* sums) const {
    const int64_t ld = filters_ + kL, whole = filters.size() / kL * kL;
    const int64_t left = filters.size() - whole, last = filters.end - kL;
    for (int64_t n = 0; n < samples.size(); ++n)
      for (int64_t k = 0; k < whole + kL; ++k) {
        const int64_t filter = k < whole ? filters.begin + k : last + k - whole;
        sums[n * ld + k] = bias_ != nullptr ? bias_[filter] : T{0};
      }
    const int64_t strips = ceil_div(whole, kStrip) + (left > 0 ? 1 : 0);
    for (int64_t c = 0; c < view_.C; c += kSampleRows) {
      const Range terms{c, std::min(c + kSampleRows, view_.C)};
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t k = std::min(s * kStrip, whole);
        const bool more = s + 1 < strips;
        const int64_t next =
            more ? weight(c, filters.begin + k + kStrip) : weight(terms.end, filters.begin);
        if (k < whole)
          sum_strip(samples, terms, filters.begin + k, std::min(kStrip, whole - k), next, sums + k);
        else
          sum_strip(samples, terms, last, kL, next, sums + whole);
      }
    }
    for (int64_t n = 0; n < samples.size(); ++n) {
      const int64_t to = dst(samples.begin + n) + filters.begin;
      epilogue_.store(sums + n * ld, whole, to, 1);
      if (left > 0) epilogue_.store(sums + n * ld + whole + kL - left, left, to + whole, 1);
    }
  }

  // next: of the weights of the strip to come, which are fetched meanwhile.
  void sum_strip(Range samples, Range terms, int64_t filter, int64_t width, int64_t next,
                 T* sums) const {
    const int64_t ld = filters_ + kL;
    const T* columns = w_ + weight(terms.begin, filter);
    const ProductRun run{0, 0, terms.size()};
    const void* fetch[kSampleRows];
    auto line = reinterpret_cast<uintptr_t>(w_) + static_cast<uintptr_t>(next) * sizeof(T);
    for (int64_t c = 0; c < terms.size(); ++c) {
      fetch[c] = reinterpret_cast<const void*>(line);
      for (int64_t v = 1; v < kProductVectors; ++v)
        __builtin_prefetch(
            reinterpret_cast<const void*>(line + static_cast<uintptr_t>(v) * kVectorBytes));
      line += static_cast<uintptr_t>(view_.weight_c) * sizeof(T);
    }
    PixelProduct<T> tile{};
    tile.columns = columns;
    tile.row_step = 1;
    tile.column_step = view_.weight_c;
    tile.runs = &run;
    tile.run_count = 1;
    tile.sum_stride = ld;
    tile.accumulate = true;
    tile.fetch = fetch;
    const int64_t tiles = ceil_div(samples.size(), int64_t{kProductRows});
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t n = t * samples.size() / tiles, rows = (t + 1) * samples.size() / tiles - n;
      for (int64_t m = 0; m < rows; ++m)
        tile.rows[m] = src_ + (samples.begin + n + m) * view_.src.n + terms.begin;
      tile.sum = sums + n * ld;
      pixel_product_kernel<T>(rows, width / kL)(tile);
    }
  }

  int64_t weight(int64_t c, int64_t k) const { return c * view_.weight_c + k; }
  int64_t dst(int64_t n) const { return view_.dst_offset + n * view_.dst.n; }

  const ConvView& view_;
  const T* src_;
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
  SampleGemm<T>(view, src, w, bias, epilogue).run(pool);
}

template void sample_gemm(const ConvView&, const float*, const float*, const float*,
                          const Epilogue<float>&, const Parallel&);
template void sample_gemm(const ConvView&, const double*, const double*, const double*,
                          const Epilogue<double>&, const Parallel&);

}  // namespace torchconv::cpu
