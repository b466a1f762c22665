// The geometry of a band of grouped images, from one sample's shape.
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
  std::stable_sort(runs.begin(), runs.end(),
                   [](const GroupRun& a, const GroupRun& b) { return a.count > b.count; });
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

}  // namespace torchconv::cpu
