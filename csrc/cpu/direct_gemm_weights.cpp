// The weights of direct_gemm.h: panels of filters, whatever the order of the weight's axes.
#include <algorithm>
#include <vector>

#include "core/buffer.h"
#include "cpu/channel_band.h"
#include "cpu/channel_pairs.h"
#include "cpu/conv_pack.h"
#include "cpu/direct_gemm.h"
#include "cpu/direct_plan.h"
#include "cpu/microkernels/gemm.h"
#include "cpu/parallel_range.h"
#include "cpu/row_pairs.h"
#include "cpu/transpose_tile.h"

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

template <typename A>
int64_t padded_filters(const ConvView& view) {
  return round_up(view.K, kLanes<A>);
}

// Calls f(view of the part's filters, the first of them) for each part.
template <typename F>
void for_parts(const ConvView& view, const std::vector<int64_t>& cuts, F&& f) {
  for (size_t i = 0; i < cuts.size(); ++i) {
    ConvView part = view;
    part.K = (i + 1 < cuts.size() ? cuts[i + 1] : view.K) - cuts[i];
    f(part, cuts[i]);
  }
}

// Where weights go: rows of terms in one panel after the other.
template <typename T>
struct PanelRows {
  using V = WideVec<T>;
  Wide<T>* first;        // of the first panel
  int64_t panel, width;  // between panels, and of all of them
  bool streams;

  // Filters [k, k + lanes) of a term.
  TORCHCONV_INLINE void store(int64_t row, int64_t k, typename V::Type weights) const {
    constexpr int64_t kWidth = kPanel<Wide<T>>;
    const int64_t at = k / kWidth * kWidth;
    Wide<T>* to = first + k / kWidth * panel + row * std::min(kWidth, width - at) + (k - at);
    if (streams)
      stream_bytes(to, weights);
    else
      V::Registers::store(to, weights);
  }
};

// Row rows[i] of the panels gets w[k*weight_k + i] for k < filters and i < count, and zero for the
// other k < to.width.
template <typename T>
void pack_run(const T* w, int64_t weight_k, int64_t filters, const int32_t* rows, int64_t count,
              const PanelRows<T>& to) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  int64_t i = 0;
  if (weight_k == 1) {
    for (; i < count; ++i)
      for (int64_t k = 0; k < to.width; k += kL)
        to.store(rows[i], k, V::load_partial(w + i + k, std::min(kL, filters - k)));
    return;
  }
  for (constexpr int64_t kFew = 3; i + kFew < count; i += kL) {
    const int64_t n = std::min(kL, count - i);
    for (int64_t k = 0; k < to.width; k += kL) {
      const int64_t used = std::min(kL, filters - k);
      typename V::Type tile[kL];
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r)
        tile[r] = r < used ? V::load_partial(w + (k + r) * weight_k + i, n) : typename V::Type{};
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int r = 0; r < kL; ++r)
        if (r < n) to.store(rows[i + r], k, tile[r]);
    }
  }
  for (; i < count; ++i)
    for (int64_t k = 0; k < to.width; k += kL) {
      Wide<T> lanes[kL] = {};
      for (int64_t r = 0; r < std::min(kL, filters - k); ++r)
        lanes[r] = to_wide(w[(k + r) * weight_k + i]);
      to.store(rows[i], k, V::Registers::load(lanes));
    }
}

}  // namespace

bool direct_gemm_by_pairs(const ConvView& view) { return takes_pairs(view); }

int64_t direct_gemm_chunk(const ConvView& view, int64_t element_size) {
  const int64_t taps = std::max<int64_t>(1, static_cast<int64_t>(view.taps.size()));
  // A panel of a chunk lies in the second-level cache beside a band of the image, whose pixels must
  // be narrow enough for several rows of them. One tap mostly needs no band, nor do taps that no
  // two outputs share.
  constexpr int64_t kPanelBytes = 256 << 10, kPixelBytes = 1024;
  const int64_t panel = kPanelBytes / (kMaxVectors * kVectorBytes) / taps;
  const int64_t pixel = kPixelBytes / element_size;
  const bool apart = std::all_of(view.taps.begin(), view.taps.end(), [&](const ConvTap& tap) {
    return tap.h >= 0 && tap.h < view.step_h && tap.w >= 0 && tap.w < view.step_w;
  });
  const int64_t limit = std::max<int64_t>(1, taps == 1 || apart ? panel : std::min(panel, pixel));
  if (limit >= view.C) return std::max<int64_t>(1, view.C);
  const int64_t even = ceil_div(view.C, ceil_div(view.C, limit));
  // Whole cache lines, where there are enough.
  const int64_t line = 64 / element_size;
  return even >= 4 * line ? std::min(view.C, round_up(even, line)) : even;
}

template <typename T>
int64_t direct_gemm_weights_size(const ConvView& view) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (takes_row_pairs(view))
      return pair_view(row_view(row_image(view))).terms() * padded_filters<Wide<T>>(view);
  }
  const bool pairs = std::is_same_v<T, BFloat16> && takes_pairs(view);
  const int64_t terms = pairs ? pair_view(view).terms() : view.terms();
  return view.groups * terms * padded_filters<Wide<T>>(view);
}

namespace {

// With chunks of that many channels.
template <typename T>
void pack_chunks(const ConvView& view, int64_t chunk_size, const T* w, Wide<T>* packed,
                 const Parallel& pool) {
  using A = Wide<T>;
  if (view.terms() == 0) return;
  constexpr int64_t kWidth = kPanel<A>;
  const int64_t taps = static_cast<int64_t>(view.taps.size());
  const int64_t chunks = ceil_div(view.C, chunk_size), panels = ceil_div(view.K, kWidth);
  // Neighbouring filters are read together: their rows are short and far apart.
  constexpr int64_t kMostTogether = 4;
  const int64_t together = view.weight_k == 1 ? std::min(ceil_div(panels, 4), kMostTogether) : 1;
  const int64_t parts = ceil_div(panels, together);
  const WorkSplit split(view.groups * chunks * parts, kPackingOperations *
                                                          static_cast<double>(chunk_size * taps) *
                                                          static_cast<double>(together * kWidth));
  parallel_for_with_scratch(pool, 0, split.slots, 1, [&](int64_t first, int64_t last) {
    // Whoever packs everything will also read everything.
    const bool alone = split.slots > 1 && first == 0 && last == split.slots;
    const bool streams = !alone && shared_by_threads(view);
    std::vector<TermRun> runs;
    std::vector<int32_t> rows;
    int64_t ordered = -1;
    for (int64_t item = split.begin(first); item < split.begin(last); ++item) {
      const int64_t part = item % parts, chunk = item / parts % chunks;
      const int64_t g = item / parts / chunks;
      const int64_t c = chunk * chunk_size, channels = std::min(chunk_size, view.C - c);
      if (ordered != chunk) order_terms(view, c, channels, &runs, &rows);
      ordered = chunk;
      const int64_t k = part * together * kWidth;
      const int64_t filters = std::min(together * kWidth, view.K - k);
      const PanelRows<T> to{
          packed + (g * view.terms() + c * taps) * padded_filters<A>(view) + k * channels * taps,
          kWidth * channels * taps, round_up(filters, kLanes<A>), streams};
      const T* from = w + g * view.weight_group + k * view.weight_k;
      for (size_t r = 0; r < runs.size(); ++r) {
        // Short runs far apart are not foreseen by the hardware.
        constexpr size_t kAhead = 16;
        if (view.weight_k == 1 && r + kAhead < runs.size())
          for (int64_t i = 0; i < filters; i += 64 / static_cast<int64_t>(sizeof(T)))
            __builtin_prefetch(from + runs[r + kAhead].source + i);
        pack_run(from + runs[r].source, view.weight_k, filters, rows.data() + runs[r].first,
                 runs[r].count, to);
      }
    }
    if (streams) stream_fence();
  });
}

// A panel of pairs of channels from weights in any order of axes: whatever is innermost in memory
// is read in vectors, and transposed to vectors of filters.
class PairPanel {
 public:
  // The panel of filters [k, k + filters) of so many channels, [tap][pair][width].
  PairPanel(const ConvView& view, const BFloat16* w, int64_t channels, int64_t filters, float* to)
      : view_(view),
        w_(w),
        channels_(channels),
        pairs_(ceil_div(channels, int64_t{2})),
        filters_(filters),
        width_(round_up(filters, kL)),
        to_(to) {}

  void pack() const {
    for (int64_t k = 0; k < width_; k += kL) {
      if (view_.weight_k == 1)
        zip_filters(k);
      else if (view_.weight_c == 1)
        transpose_channels(k);
      else
        transpose_taps(k);
    }
  }

 private:
  using Bits = Vec<uint32_t>;
  static constexpr int64_t kL = Bits::kLanes;

  void store(int64_t tap, int64_t pair, int64_t k, Bits::Type weights) const {
    Bits::store(to_ + (tap * pairs_ + pair) * width_ + k, weights);
  }

  // Filters are neighbours.
  void zip_filters(int64_t k) const {
    const int64_t n = std::min(kL, filters_ - k), taps = static_cast<int64_t>(view_.taps.size());
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const BFloat16* even = w_ + k + view_.taps[tap].weight + 2 * pair * view_.weight_c;
        const bool odd = 2 * pair + 1 < channels_;
        store(tap, pair, k, zip_pairs(even, n, even + (odd ? view_.weight_c : 0), odd ? n : 0));
      }
  }

  // tile[f] = load(filter k + f); then the lanes' vectors of filters: f(lane, vector) for each.
  template <typename Load, typename Store>
  TORCHCONV_INLINE void transpose(int64_t k, Load&& load, Store&& store_lane) const {
    Bits::Type tile[kL];
#pragma GCC unroll 16
    for (int f = 0; f < kL; ++f)
      tile[f] = k + f < filters_ ? load(w_ + (k + f) * view_.weight_k) : Bits::Type{};
    transpose_steps<1>(tile);
#pragma GCC unroll 16
    for (int l = 0; l < kL; ++l) store_lane(l, tile[l]);
  }

  // Channels are.
  void transpose_channels(int64_t k) const {
    using Halves = Vec<uint16_t, 2 * kL>;
    const auto taps = static_cast<int64_t>(view_.taps.size());
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t pair = 0; pair < pairs_; pair += kL) {
        const int64_t at = view_.taps[tap].weight + 2 * pair;
        const int64_t n = std::min(2 * kL, channels_ - 2 * pair);
        transpose(
            k,
            [&](const BFloat16* p) {
              return bit_cast<Bits::Type>(Halves::load_partial(p + at, n));
            },
            [&](int64_t lane, Bits::Type filters) {
              if (pair + lane < pairs_) store(tap, pair + lane, k, filters);
            });
      }
  }

  // Taps are, or nearly: others lie between those of a stride's phase.
  void transpose_taps(int64_t k) const {
    const auto [least, most] = tap_span(view_, &ConvTap::weight);
    const auto taps = static_cast<int64_t>(view_.taps.size());
    if (most - least == taps && view_.weight_c == taps && 2 * taps <= kL)
      return transpose_few_taps(k, least);
    for (int64_t first = least; first < most; first += kL) {
      const int64_t n = std::min(kL, most - first);
      int64_t tap_of[kL];
      std::fill_n(tap_of, kL, int64_t{-1});
      for (int64_t tap = 0; tap < taps; ++tap)
        if (const int64_t lane = view_.taps[tap].weight - first; lane >= 0 && lane < n)
          tap_of[lane] = tap;
      for (int64_t pair = 0; pair < pairs_; ++pair) {
        const int64_t at = first + 2 * pair * view_.weight_c;
        const bool odd = 2 * pair + 1 < channels_;
        transpose(
            k,
            [&](const BFloat16* p) {
              return zip_pairs(p + at, n, p + at + (odd ? view_.weight_c : 0), odd ? n : 0);
            },
            [&](int64_t lane, Bits::Type filters) {
              if (tap_of[lane] >= 0) store(tap_of[lane], pair, k, filters);
            });
      }
    }
  }

  // All taps of a small kernel, those of several pairs together. least: the first one's weight.
  void transpose_few_taps(int64_t k, int64_t least) const {
    using Halves = Vec<uint16_t, 2 * kL>;
    const auto taps = static_cast<int64_t>(view_.taps.size());
    const int64_t together = kL / taps;
    // Lane pair * taps + t joins element t of the pair's first channel with that of its second.
    uint16_t halves[2 * kL] = {};
    int64_t tap_of[kL];
    for (int64_t tap = 0; tap < taps; ++tap) tap_of[view_.taps[tap].weight - least] = tap;
    for (int64_t l = 0; l < together * taps; ++l)
      for (int64_t odd = 0; odd < 2; ++odd)
        halves[2 * l + odd] = static_cast<uint16_t>((2 * (l / taps) + odd) * taps + l % taps);
    const auto order = Halves::load(halves);
    for (int64_t pair = 0; pair < pairs_; pair += together) {
      const int64_t at = least + 2 * pair * taps;
      const int64_t n = std::min(2 * together, channels_ - 2 * pair) * taps;
      transpose(
          k,
          [&](const BFloat16* p) {
            return bit_cast<Bits::Type>(permute(Halves::load_partial(p + at, n), order));
          },
          [&](int64_t lane, Bits::Type filters) {
            const int64_t to = pair + lane / taps;
            if (lane < together * taps && to < pairs_) store(tap_of[lane % taps], to, k, filters);
          });
    }
  }

  const ConvView& view_;
  const BFloat16* w_;
  int64_t channels_, pairs_, filters_, width_;
  float* to_;
};

// Where channels are neighbours a pair is one element, if it is aligned.
void pack_pairs(const ConvView& view, const BFloat16* w, float* packed, const Parallel& pool) {
  if (view.terms() == 0) return;
  ConvView pairs = pair_view(view);
  const int64_t chunk = direct_gemm_chunk(pairs, sizeof(float));
  const bool aligned = reinterpret_cast<uintptr_t>(w) % alignof(float) == 0;
  if (view.weight_c == 1 && view.C % 2 == 0 && aligned) {
    pairs.weight_k /= 2, pairs.weight_group /= 2;
    for (ConvTap& tap : pairs.taps) tap.weight /= 2;
    return pack_chunks(pairs, chunk, reinterpret_cast<const float*>(w), packed, pool);
  }
  const int64_t filters = padded_filters<float>(view), chunks = ceil_div(pairs.C, chunk);
  const int64_t taps = static_cast<int64_t>(view.taps.size());
  constexpr int64_t kWidth = kPanel<float>;
  const int64_t panels = ceil_div(view.K, kWidth);
  const WorkSplit split(view.groups * chunks * panels,
                        kPackingOperations * static_cast<double>(chunk * taps * kWidth));
  split.run(pool, [&](int64_t begin, int64_t end, int64_t) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t g = item / panels / chunks;
      const int64_t first = item / panels % chunks * chunk, k = item % panels * kWidth;
      const int64_t channels = std::min(2 * chunk, view.C - 2 * first);
      PairPanel(view, w + g * view.weight_group + k * view.weight_k + 2 * first * view.weight_c,
                channels, std::min(kWidth, view.K - k),
                packed + (g * pairs.terms() + first * taps) * filters +
                    k * ceil_div(channels, int64_t{2}) * taps)
          .pack();
    }
  });
}

}  // namespace

template <typename T>
bool direct_gemm_packs_along(const ConvView& view) {
  const int64_t pixels = view.N * view.pixels();
  // Two-byte weights, but for those of groups, are best packed in the order of memory, or kept.
  const bool pairs =
      std::is_same_v<T, BFloat16> && view.groups > 1 && view.dst.c == 1 && takes_pairs(view);
  return (std::is_same_v<T, Wide<T>> || pairs) && view.taps.size() == 1 && view.C > 0 &&
         (view.weight_c == 1 || view.weight_k == 1) &&
         (view.groups > 1 || pixels <= kPixelsPackedAlong) &&
         (pixels >= kPixelsForTwo || !direct_plan_cuts_pixels(view, sizeof(T)));
}

template <typename T>
void direct_gemm_pack_panel(const ConvView& view, const T* w, int64_t channels, int64_t filters,
                            Wide<T>* panel) {
  constexpr int64_t kL = WideVec<T>::kLanes;
  const int64_t width = round_up(filters, kL);
  if (view.weight_k != 1 && view.weight_c != 1) {  // taps are innermost
    std::vector<TermRun> runs;
    std::vector<int32_t> rows;
    order_terms(view, 0, channels, &runs, &rows);
    const PanelRows<T> to{panel, 0, width, false};
    for (const TermRun& run : runs)
      pack_run(w + run.source, view.weight_k, filters, rows.data() + run.first, run.count, to);
    return;
  }
  for (const ConvTap& tap : view.taps) {
    const T* const from = w + tap.weight;
    if (view.weight_k == 1) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < width; k += kL)
          Vec<T>::store(panel + c * width + k, Vec<T>::load_partial(from + c * view.weight_c + k,
                                                                    std::min(kL, filters - k)));
    } else {
      // A vector of filters at a time: the hardware foresees as many rows, and not those of two.
      constexpr int64_t kAhead = 4 * 64 / static_cast<int64_t>(sizeof(T));
      for (int64_t k = 0; k < width; k += kL) {
        const int64_t rows = std::min(kL, filters - k);
        const T* const row = from + k * view.weight_k;
        for (int64_t c = 0; c < channels; c += kL) {
          for (int64_t r = 0; r < rows; ++r)
            __builtin_prefetch(row + r * view.weight_k + c + kAhead);
          transpose_tile(row + c, view.weight_k, rows, std::min(kL, channels - c),
                         panel + c * width + k, width, std::min(kL, channels - c));
        }
      }
    }
    panel += channels * width;
  }
}

template <>
void direct_gemm_pack_panel(const ConvView& view, const BFloat16* w, int64_t channels,
                            int64_t filters, float* panel) {
  PairPanel(view, w, channels, filters, panel).pack();
}

template <typename T>
void direct_gemm_pack_weights(const ConvView& view, const T* w, Wide<T>* packed,
                              const Parallel& pool) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (takes_row_pairs(view)) {
      const ConvView image = row_image(view);
      const Buffer<BFloat16> rows(view.K * view.terms());
      pack_row_weights(image, w, rows.get());
      return pack_pairs(row_view(image), rows.get(), packed, pool);
    }
    if (takes_pairs(view)) return pack_pairs(view, w, packed, pool);
  }
  pack_chunks(view, direct_gemm_chunk(view, sizeof(Wide<T>)), w, packed, pool);
}

int64_t direct_gemm_parts_size(const ConvView& view, const std::vector<int64_t>& cuts) {
  int64_t size = 0;
  for_parts(view, cuts,
            [&](const ConvView& part, int64_t) { size += direct_gemm_weights_size<float>(part); });
  return size;
}

void direct_gemm_pack_parts(const ConvView& view, const std::vector<int64_t>& cuts, const float* w,
                            float* packed, const Parallel& pool) {
  for_parts(view, cuts, [&](const ConvView& part, int64_t first) {
    direct_gemm_pack_weights(part, w + first * view.weight_k, packed, pool);
    packed += direct_gemm_weights_size<float>(part);
  });
}

#define TORCHCONV_INSTANTIATE(T)                                 \
  template bool direct_gemm_packs_along<T>(const ConvView&);     \
  template int64_t direct_gemm_weights_size<T>(const ConvView&); \
  template void direct_gemm_pack_weights(const ConvView&, const T*, Wide<T>*, const Parallel&);
TORCHCONV_INSTANTIATE(float)
TORCHCONV_INSTANTIATE(double)
TORCHCONV_INSTANTIATE(BFloat16)
TORCHCONV_INSTANTIATE(Float16)
#undef TORCHCONV_INSTANTIATE
template void direct_gemm_pack_panel(const ConvView&, const float*, int64_t, int64_t, float*);
template void direct_gemm_pack_panel(const ConvView&, const double*, int64_t, int64_t, double*);

}  // namespace torchconv::cpu
