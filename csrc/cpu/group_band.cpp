// The geometry of a band of grouped images, from one sample's shape, and its copies, compiled once.
#include "cpu/group_band.h"

namespace torchconv::cpu {
namespace {

// What a band may take, and what it should: it shares the second-level cache with the image.
constexpr int64_t kMostBytes = 512 << 10, kBandBytes = 64 << 10;

}  // namespace

std::vector<GroupRun> group_runs(const ConvView& view) {
  std::vector<ConvTap> taps = view.taps;
  std::sort(taps.begin(), taps.end(),
            [](const ConvTap& a, const ConvTap& b) { return a.h != b.h ? a.h < b.h : a.w < b.w; });
  const int64_t longest = view.step_w <= 2 ? kMaxRun : 1;
  std::vector<GroupRun> runs;
  const auto size = static_cast<int64_t>(taps.size());
  for (int64_t t = 0; t < size;) {
    int64_t n = 1;
    while (t + n < size && taps[t + n].h == taps[t].h && taps[t + n].w == taps[t].w + n) ++n;
    while (n > 0) {
      int64_t count = std::min(n, longest);
      if (n == longest + 1 && longest > 1) count = n / 2;
      // Two of every other pixel share none.
      if (count == 2 && view.step_w != 1) count = 1;
      GroupRun run{taps[t].h, taps[t].w, count, {}};
      for (int64_t s = 0; s < count; ++s) run.weights[s] = taps[t + s].weight;
      runs.push_back(run);
      t += count;
      n -= count;
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const GroupRun& a, const GroupRun& b) {
    return a.count != b.count ? a.count > b.count : a.w < b.w;
  });
  return runs;
}

GroupBand::GroupBand(const ConvView& view, int64_t element_size, bool permutes, int64_t unit)
    : fits(false), lanes(kVectorBytes / element_size) {
  const int64_t side = permutes ? lanes / std::max(view.C, view.K) : 0;
  const int64_t vector_groups = std::clamp<int64_t>(side, 1, view.groups);
  // A vector of channels may feed several of filters.
  const int64_t vectors = permutes ? std::max<int64_t>(1, lanes / (vector_groups * view.C)) : 1;
  groups = std::min(vector_groups * vectors, view.groups);
  blocks = ceil_div(view.groups, groups);
  src_vectors = ceil_div(groups * view.C, lanes);
  vector_filters = std::min(lanes, vector_groups * view.K);
  dst_vectors = ceil_div(groups * view.K, vector_filters);
  const Range taps_h = tap_span(view, &ConvTap::h), taps_w = tap_span(view, &ConvTap::w);
  first_h = taps_h.begin, first_w = taps_w.begin;
  const int64_t span_h = taps_h.size() - 1, span_w = taps_w.size() - 1;
  const int64_t most = kMostBytes / (element_size * lanes * src_vectors);
  if (view.J > most || span_w > most || span_h > most || view.step_w > most || view.step_h > most)
    return;
  width = (view.J - 1) * view.step_w + span_w + 1;
  if (width > most / (span_h + 1)) return;
  fits = true;
  const int64_t budget = kBandBytes / (element_size * lanes * src_vectors * width);
  // At least as many rows as the halo repeats.
  band = std::max((budget - span_h - 1) / view.step_h, std::min(span_h, int64_t{8})) + 1;
  band =
      std::min({band, std::max<int64_t>(0, (most / width - span_h - 1) / view.step_h) + 1, view.I});
  bands = ceil_div(view.I, band);
  band = std::min(round_up(ceil_div(view.I, bands), unit), view.I);
  bands = ceil_div(view.I, band);
  rows = (band - 1) * view.step_h + span_h + 1;
  // A tile reads as if it were full.
  plane = (rows * width + kSumTiles[0] * view.step_w + kMaxRun) * lanes;
  size = src_vectors * plane;
}

template <typename T, bool kPairs>
void copy_group_window(const GroupWindow& window, const T* src, Wide<T>* to) {
  using V = WideVec<T>;
  constexpr int64_t kL = V::kLanes;
  const ConvStrides& s = window.strides;
  const auto inside = [](int64_t first, int64_t count, int64_t size) {
    const int64_t begin = std::clamp(-first, int64_t{0}, count);
    return Range{begin, std::clamp(size - first, begin, count)};
  };
  const Range rows = inside(window.h, window.rows, window.H);
  const Range columns = inside(window.w, window.columns, window.W);
  const int64_t row_size = window.columns * kL;
  if (rows.empty() || columns.empty()) return fill_zero(to, window.rows * row_size);
  fill_zero(to, rows.begin * row_size);
  fill_zero(to + rows.end * row_size, (window.rows - rows.end) * row_size);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    fill_zero(to + r * row_size, columns.begin * kL);
    fill_zero(to + r * row_size + columns.end * kL, (window.columns - columns.end) * kL);
  }
  src += (window.h + rows.begin) * s.row + (window.w + columns.begin) * s.column;
  to += rows.begin * row_size + columns.begin * kL;
  if (s.c == 1) {
    for (int64_t r = 0; r < rows.size(); ++r, to += row_size, src += s.row) {
      const T* pixel = src;
      if (window.channels == kL) {
        for (int64_t p = 0; p < columns.size(); ++p, pixel += s.column) {
          __builtin_prefetch(pixel + window.ahead, 0, 2);
          V::Registers::store(to + p * kL, V::load(pixel));
        }
      } else {
        for (int64_t p = 0; p < columns.size(); ++p, pixel += s.column) {
          __builtin_prefetch(pixel + window.ahead, 0, 2);
          V::Registers::store(to + p * kL, V::load_partial(pixel, window.channels));
        }
      }
    }
    return;
  }
  // Else pixels are neighbours: square pieces of channels and pixels are transposed. Whole rows are
  // one run of pixels.
  const bool whole = columns.size() == s.row;
  const int64_t runs = whole ? 1 : rows.size();
  const int64_t run = whole ? rows.size() * columns.size() : columns.size();
  const int64_t gap = (window.columns - columns.size()) * kL;
  for (int64_t r = 0; r < runs; ++r, to += row_size, src += s.row) {
    const auto load = [&](int64_t c, int64_t p, int64_t n) {
      if constexpr (kPairs) {
        const T* first = src + p + 2 * c * s.c;
        return bit_cast<typename V::Type>(zip_pairs(first, n, first + s.c, n));
      } else {
        return n == kL ? V::load(src + p + c * s.c) : V::load_partial(src + p + c * s.c, n);
      }
    };
    constexpr int64_t kPlanes = kPairs ? 2 : 1;
    Wide<T>* at = to;
    int64_t rest = columns.size();
    for (int64_t p = 0; p < run; p += kL) {
      const int64_t n = std::min(kL, run - p);
      for (int64_t c = 0; window.ahead != 0 && c < kPlanes * window.channels; ++c)
        __builtin_prefetch(src + p + c * s.c + window.ahead, 0, 2);
      typename V::Type tile[kL];
      if (window.channels == kL && n == kL) {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c) tile[c] = load(c, p, kL);
      } else {
#pragma GCC unroll 16
        for (int c = 0; c < kL; ++c)
          tile[c] = c < window.channels ? load(c, p, n) : typename V::Type{};
      }
      transpose_steps<1>(tile);
#pragma GCC unroll 16
      for (int l = 0; l < kL; ++l) {
        if (l >= n) continue;
        V::Registers::store(at, tile[l]);
        at += kL;
        if (--rest == 0) {
          rest = columns.size();
          at += gap;
        }
      }
    }
  }
}

template <typename T, bool kPairs>
void GroupBand::fill(const ConvView& view, const T* src, int64_t block, int64_t i0,
                     Wide<T>* scratch) const {
  constexpr int64_t kChannels = kPairs ? 2 : 1;
  const int64_t channels = groups_in(view, block) * view.C;
  src += block * groups * view.C * kChannels * view.src.c;
  GroupWindow window{view.src, 0,       view.H, view.W, i0 * view.step_h + first_h,
                     rows,     first_w, width,  0};
  for (int64_t v = 0; v < src_vectors; ++v) {
    window.channels = std::min(lanes, channels - v * lanes);
    const T* from = src + v * lanes * kChannels * view.src.c;
    Wide<T>* const to = scratch + v * plane;
    if constexpr (kPairs) {
      if (view.src.c == 1) {
        GroupWindow pairs = window;
        pairs.strides.row /= 2, pairs.strides.column /= 2;
        copy_group_window(pairs, reinterpret_cast<const float*>(from), to);
        continue;
      }
    }
    copy_group_window<T, kPairs>(window, from, to);
  }
}

#define TORCHCONV_GROUP_BAND(T, kPairs)                                                           \
  template void copy_group_window<T, kPairs>(const GroupWindow&, const T*, Wide<T>*);             \
  template void GroupBand::fill<T, kPairs>(const ConvView&, const T*, int64_t, int64_t, Wide<T>*) \
      const;
TORCHCONV_GROUP_BAND(float, false)
TORCHCONV_GROUP_BAND(double, false)
TORCHCONV_GROUP_BAND(BFloat16, false)
TORCHCONV_GROUP_BAND(Float16, false)
TORCHCONV_GROUP_BAND(BFloat16, true)
#undef TORCHCONV_GROUP_BAND

}  // namespace torchconv::cpu
