// The groups of axis_groups.h.
#include "cpu/axis_groups.h"

#include <algorithm>

namespace torchconv::cpu {

std::vector<int64_t> distinct_offsets(const ConvView& view, int64_t ConvTap::* axis) {
  std::vector<int64_t> offsets;
  for (const ConvTap& tap : view.taps) offsets.push_back(tap.*axis);
  std::sort(offsets.begin(), offsets.end());
  offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
  return offsets;
}

std::vector<AxisGroup> group_outputs(const std::vector<int64_t>& offsets, int64_t step,
                                     int64_t size, Range outputs, int64_t least) {
  std::vector<AxisGroup> groups;
  // Both ends fall as outputs rise.
  Range taps{static_cast<int64_t>(offsets.size()), static_cast<int64_t>(offsets.size())};
  for (int64_t o = outputs.begin; o < outputs.end; ++o) {
    while (taps.begin > 0 && offsets[taps.begin - 1] + o * step >= 0) --taps.begin;
    while (taps.end > 0 && offsets[taps.end - 1] + o * step >= size) --taps.end;
    AxisGroup* group = groups.empty() ? nullptr : &groups.back();
    if (group != nullptr && (group->outputs.size() < least || outputs.end - o < least ||
                             (group->taps.begin == taps.begin && group->taps.end == taps.end))) {
      group->outputs.end = o + 1;
      if (taps.empty()) continue;
      group->taps = group->taps.empty() ? taps
                                        : Range{std::min(group->taps.begin, taps.begin),
                                                std::max(group->taps.end, taps.end)};
    } else {
      groups.push_back({{o, o + 1}, taps});
    }
  }
  return groups;
}

}  // namespace torchconv::cpu
