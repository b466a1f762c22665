// See depthwise_taps.h: view.taps is the product of its rows and columns, both sorted one way.
#include "cpu/depthwise_taps.h"

namespace torchconv::cpu {

DepthwiseTaps::DepthwiseTaps(const ConvView& v) : filter(v.K > 1 ? v.weight_k : v.weight_group) {
  const auto count = static_cast<int64_t>(v.taps.size());
  while (columns < count && v.taps[columns].h == v.taps[0].h) ++columns;
  rows = columns > 0 ? count / columns : 0;
  if (count == 0) return;
  const ConvTap* taps = v.taps.data();
  const bool up = rows > 1 && taps[0].h > taps[columns].h;
  const bool left = columns > 1 && taps[0].w > taps[1].w;
  const auto tap = [&](int64_t r, int64_t s) {
    return taps[(up ? rows - 1 - r : r) * columns + (left ? columns - 1 - s : s)];
  };
  const ConvTap first = tap(0, 0);
  first_h = first.h;
  first_w = first.w;
  weight_first = first.weight;
  if (rows > 1) {
    gap_h = tap(1, 0).h - first.h;
    weight_row = tap(1, 0).weight - first.weight;
  }
  if (columns > 1) {
    gap_w = tap(0, 1).w - first.w;
    weight_column = tap(0, 1).weight - first.weight;
  }
  for (int64_t t = 0; t < count; ++t) {
    const int64_t r = t / columns, s = t % columns;
    const ConvTap& at = tap(r, s);
    regular = regular && at.h == first_h + r * gap_h && at.w == first_w + s * gap_w &&
              at.weight == weight(r, s);
  }
}

DepthwiseTaps DepthwiseTaps::of(const ConvProblem& p) {
  DepthwiseTaps taps;
  taps.rows = p.R;
  taps.columns = p.S;
  taps.filter = p.R * p.S;
  taps.weight_row = p.flip ? -p.S : p.S;
  taps.weight_column = p.flip ? -1 : 1;
  taps.weight_first = p.flip ? p.R * p.S - 1 : 0;
  return taps;
}

bool depthwise_spreads(const ConvProblem& p) {
  return p.groups == p.C && p.K == p.C && p.R == p.S && (p.R == 3 || p.R == 5 || p.R == 7) &&
         p.stride_h == 2 && p.stride_w == 2 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.pad_top >= 0 && p.pad_left >= 0 && p.P > 0 && p.Q > 0;
}

}  // namespace torchconv::cpu
