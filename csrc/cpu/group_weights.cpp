// The order of the terms of group_weights.h.
#include "cpu/group_weights.h"

#include <algorithm>

namespace torchconv::cpu {

std::vector<GroupTerm> group_terms(const ConvView& view, const GroupBand& band,
                                   int64_t term_channels) {
  std::vector<GroupTerm> terms;
  int64_t at = 0;
  const std::vector<GroupRun> runs = group_runs(view);
  for (int64_t v = 0; v < band.src_vectors; ++v) {
    const int64_t first = v * band.lanes;
    const int64_t channels = band.groups > 1 ? view.C : std::min(band.lanes, view.C - first);
    for (const GroupRun& run : runs)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t s = 0; s < run.count; ++s)
          for (int64_t half = 0; half < term_channels; ++half)
            terms.push_back(
                {((first + c) * term_channels + half) * view.weight_c + run.weights[s], at++});
  }
  std::sort(terms.begin(), terms.end(),
            [](const GroupTerm& a, const GroupTerm& b) { return a.offset < b.offset; });
  return terms;
}

}  // namespace torchconv::cpu
