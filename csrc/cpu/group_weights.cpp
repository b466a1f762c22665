// The order of the terms of group_weights.h.
#include "cpu/group_weights.h"

#include <algorithm>

namespace torchconv::cpu {
namespace {

// Tap s of a run of `count`, behind the `first` taps of the runs before it.
struct RunTap {
  int64_t weight, first, count, s;
  int64_t phase, taps;  // its phase's first term, and taps
};

std::vector<RunTap> run_taps(const std::vector<const ConvView*>& phases) {
  std::vector<RunTap> all;
  int64_t phase = 0;
  for (const ConvView* view : phases) {
    const auto taps = static_cast<int64_t>(view->taps.size());
    int64_t first = 0;
    for (const GroupRun& run : group_runs(*view)) {
      for (int64_t s = 0; s < run.count; ++s)
        all.push_back({run.weights[s], first, run.count, s, phase, taps});
      first += run.count;
    }
    phase += view->terms();
  }
  std::sort(all.begin(), all.end(),
            [](const RunTap& a, const RunTap& b) { return a.weight < b.weight; });
  return all;
}

}  // namespace

std::vector<GroupTerm> group_terms(const std::vector<const ConvView*>& phases,
                                   const GroupBand& band, int64_t term_channels) {
  const ConvView& view = *phases[0];
  const std::vector<RunTap> taps = run_taps(phases);
  std::vector<GroupTerm> terms;
  terms.reserve(static_cast<size_t>(view.C * term_channels) * taps.size());
  const auto add = [&](const RunTap& tap, int64_t c, int64_t half) {
    const int64_t begin = band.groups > 1 ? 0 : c / band.lanes * band.lanes;
    const int64_t channels = band.groups > 1 ? view.C : std::min(band.lanes, view.C - begin);
    const int64_t at =
        tap.phase + begin * tap.taps + channels * tap.first + (c - begin) * tap.count + tap.s;
    terms.push_back(
        {(c * term_channels + half) * view.weight_c + tap.weight, at * term_channels + half});
  };
  // Channels are neighbours, or taps.
  if (view.weight_c == 1) {
    for (const RunTap& tap : taps)
      for (int64_t c = 0; c < view.C; ++c)
        for (int64_t half = 0; half < term_channels; ++half) add(tap, c, half);
  } else {
    for (int64_t c = 0; c < view.C; ++c)
      for (int64_t half = 0; half < term_channels; ++half)
        for (const RunTap& tap : taps) add(tap, c, half);
  }
  return terms;
}

std::vector<GroupPiece> group_pieces(const std::vector<GroupTerm>& terms, int64_t lanes) {
  std::vector<GroupPiece> pieces;
  for (const GroupTerm& term : terms) {
    if (pieces.empty() || term.offset < pieces.back().offset ||
        term.offset >= pieces.back().offset + lanes) {
      pieces.push_back({term.offset, 0, {}});
      std::fill(std::begin(pieces.back().at), std::end(pieces.back().at), -1);
    }
    GroupPiece& piece = pieces.back();
    const int64_t l = term.offset - piece.offset;
    piece.count = std::max(piece.count, l + 1);
    piece.at[l] = term.at;
  }
  return pieces;
}

}  // namespace torchconv::cpu
