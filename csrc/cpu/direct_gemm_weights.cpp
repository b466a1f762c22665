// The weights of direct_gemm.h: panels of filters, whatever the order of the weight's axes.
#include <algorithm>
#include <vector>

#include "cpu/channel_band.h"
#include "cpu/conv_pack.h"
#include "cpu/direct_gemm.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/parallel_range.h"

namespace torchconv::cpu {
namespace {

// Terms that are neighbours in a filter, and the panel's rows where they belong.
struct TermRun {
  int64_t source, first, count;  // rows[first] to rows[first + count]
};

// The terms of a chunk in the order of memory.
void order_terms(const ConvView& view, int64_t c0, int64_t channels, std::vector<TermRun>* runs,
                 std::vector<int32_t>* rows) {
  const int64_t T = static_cast<int64_t>(view.taps.size());
  std::vector<int64_t> taps(static_cast<size_t>(T));
  for (int64_t t = 0; t < T; ++t) taps[t] = t;
  std::sort(taps.begin(), taps.end(),
            [&](int64_t a, int64_t b) { return view.taps[a].weight < view.taps[b].weight; });
  runs->clear();
  rows->clear();
  rows->reserve(static_cast<size_t>(channels * T));
  int64_t end = -1;
  const auto add = [&](int64_t c, int64_t t) {
    const int64_t source = (c0 + c) * view.weight_c + view.taps[t].weight;
    if (source != end) runs->push_back({source, static_cast<int64_t>(rows->size()), 0});
    end = source + 1;
    ++runs->back().count;
    rows->push_back(static_cast<int32_t>(t * channels + c));
  };
  if (view.weight_c == 1) {
    for (const int64_t t : taps)
      for (int64_t c = 0; c < channels; ++c) add(c, t);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      for (const int64_t t : taps) add(c, t);
  }
}

// panel[rows[i]*width + k] = w[k*weight_k + i] for k < filters and i < count, and zero for the
// other k < width.
template <typename T>
void pack_run(const T* w, int64_t weight_k, int64_t filters, int64_t width, const int32_t* rows,
              int64_t count, Wide<T>* panel) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  for (int64_t k = 0; k < width; k += kL) {
    const int64_t used = std::min(kL, filters - k);
    const T* from = w + k * weight_k;
    if (weight_k == 1) {
      for (int64_t i = 0; i < count; ++i)
        V::Registers::store(panel + rows[i] * width + k, V::load_partial(from + i, used));
      continue;
    }
    int64_t i = 0;
    for (constexpr int64_t kFew = 3; i + kFew < count; i += kL) {
      const int64_t n = std::min(kL, count - i);
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r)
        tile[r] = r < used ? V::load_partial(from + r * weight_k + i, n) : typename V::Type{};
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r)
        if (r < n) V::Registers::store(panel + rows[i + r] * width + k, tile[r]);
    }
    for (; i < count; ++i)
      for (int64_t r = 0; r < kL; ++r)
        panel[rows[i] * width + k + r] = r < used ? to_wide(from[r * weight_k + i]) : Wide<T>{0};
  }
}

}  // namespace

int64_t direct_gemm_chunk(const ConvView& view, int64_t element_size) {
  const int64_t taps = std::max<int64_t>(1, static_cast<int64_t>(view.taps.size()));
  // A panel of a chunk lies in the second-level cache beside a band of the image, whose pixels must
  // be narrow enough for several rows of them. One tap needs no band, unless the image's pixels
  // would all fall into the same cache sets (see ChannelBand).
  constexpr int64_t kPanelBytes = 256 << 10, kPixelBytes = 1024;
  const int64_t panel = kPanelBytes / (kMaxVectors * kVectorBytes) / taps;
  const int64_t pixel = kPixelBytes / element_size;
  const bool in_place = taps == 1 && view.C * element_size % kAliasedBytes != 0;
  const int64_t limit = std::max<int64_t>(1, in_place ? panel : std::min(panel, pixel));
  if (limit >= view.C) return std::max<int64_t>(1, view.C);
  const int64_t even = ceil_div(view.C, ceil_div(view.C, limit));
  // Whole cache lines, where there are enough.
  const int64_t line = 64 / element_size;
  return even >= 4 * line ? std::min(view.C, round_up(even, line)) : even;
}

template <typename T>
int64_t direct_gemm_weights_size(const ConvView& view) {
  return view.groups * view.terms() * round_up(view.K, kLanes<Wide<T>>);
}

template <typename T>
void direct_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                              const Parallel& pool) {
  using A = Wide<T>;
  if (view.terms() == 0) return;
  constexpr int64_t kWidth = kPanel<A>;
  const int64_t taps = static_cast<int64_t>(view.taps.size());
  const int64_t chunk_size = direct_gemm_chunk(view, sizeof(A));
  const int64_t chunks = ceil_div(view.C, chunk_size), panels = ceil_div(view.K, kWidth);
  const int64_t padded_filters = round_up(view.K, kLanes<A>);
  const WorkSplit split(view.groups * chunks * panels,
                        4.0 * static_cast<double>(chunk_size * taps * kWidth));
  parallel_for_with_scratch(pool, 0, split.slots, 1, [&](int64_t first, int64_t last) {
    std::vector<TermRun> runs;
    std::vector<int32_t> rows;
    int64_t ordered = -1;
    const int64_t end = std::min(last * split.grain, split.items);
    for (int64_t item = first * split.grain; item < end; ++item) {
      const int64_t panel = item % panels, chunk = item / panels % chunks;
      const int64_t g = item / panels / chunks;
      const int64_t c = chunk * chunk_size, channels = std::min(chunk_size, view.C - c);
      if (ordered != chunk) order_terms(view, c, channels, &runs, &rows);
      ordered = chunk;
      const int64_t k = panel * kWidth, filters = std::min(kWidth, view.K - k);
      A* to = packed + (g * view.terms() + c * taps) * padded_filters + k * channels * taps;
      const T* from = w + g * view.weight_group + k * view.weight_k;
      for (size_t r = 0; r < runs.size(); ++r) {
        // Short runs far apart are not foreseen by the hardware.
        constexpr size_t kAhead = 16;
        if (view.weight_k == 1 && r + kAhead < runs.size())
          for (int64_t i = 0; i < filters; i += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(from + runs[r + kAhead].source + i);
        pack_run(from + runs[r].source, view.weight_k, filters, round_up(filters, kLanes<A>),
                 rows.data() + runs[r].first, runs[r].count, to);
      }
    }
  });
}

#define TORCHCONV_INSTANTIATE(T)                                 \
  template int64_t direct_gemm_weights_size<T>(const ConvView&); \
  template void direct_gemm_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE

}  // namespace torchconv::cpu
