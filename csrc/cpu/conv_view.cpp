// Builds the tap lists of fprop and dgrad. Offsets are formed only for taps that exist, and taps
// that no output pixel can see are dropped, so a huge dilation or stride overflows nothing.
#include "cpu/conv_view.h"

#include <algorithm>

namespace torchconv::cpu {
namespace {

ConvStrides image_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  return layout == Layout::kNCHW ? ConvStrides{C * H * W, H * W, W, 1}
                                 : ConvStrides{C * H * W, 1, W * C, C};
}

struct WeightStrides {
  int64_t k, c, r, s;
};

WeightStrides weight_strides(const ConvProblem& p) {
  const int64_t C = p.C / p.groups;
  return p.weight_layout == Layout::kNCHW ? WeightStrides{C * p.R * p.S, p.R * p.S, p.S, 1}
                                          : WeightStrides{C * p.R * p.S, 1, p.S * C, C};
}

// One axis of the kernel: the taps that reach the image, by source offset.
struct AxisTap {
  int64_t offset, weight;
};

// With a stride beyond the image a tap reaches it from one output only, and so it does with the
// image's size as the stride, once the tap is moved to match: no step is too large to multiply.
std::vector<AxisTap> fprop_axis(int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                                bool flip, int64_t size, int64_t outputs) {
  std::vector<AxisTap> live;
  live.reserve(static_cast<size_t>(taps));
  for (int64_t r = 0; r < taps; ++r) {
    const int64_t offset = r * dilation - pad;
    const Range range = valid_range(outputs, stride, offset, size);
    if (range.begin >= range.end) continue;
    const int64_t moved = stride > size ? range.begin * (stride - size) : 0;
    live.push_back({offset + moved, flip ? taps - 1 - r : r});
  }
  return live;
}

struct AxisPhase {
  int64_t first, count;  // positions first, first + stride, ...
  std::vector<AxisTap> taps;
};

std::vector<AxisPhase> dgrad_axis(int64_t taps, int64_t stride, int64_t pad, int64_t dilation,
                                  bool flip, int64_t size, int64_t outputs) {
  std::vector<AxisPhase> phases;
  for (int64_t r = 0; r < taps && outputs > 0; ++r) {
    // Position h = p*stride + reach is touched by output p through tap r.
    const int64_t reach = r * dilation - pad;
    const int64_t first = reach % stride + (reach % stride < 0 ? stride : 0);
    if (first >= size) continue;
    const int64_t count = (size - 1 - first) / stride + 1;
    // h = first + i*stride: p = i + offset.
    const int64_t offset = first >= reach ? (first - reach) / stride : -((reach - first) / stride);
    const Range range = valid_range(count, 1, offset, outputs);
    if (range.begin >= range.end) continue;
    auto phase = std::find_if(phases.begin(), phases.end(),
                              [&](const AxisPhase& other) { return other.first == first; });
    if (phase == phases.end()) phase = phases.insert(phases.end(), {first, count, {}});
    phase->taps.push_back({offset, flip ? taps - 1 - r : r});
  }
  return phases;
}

std::vector<ConvTap> product(const std::vector<AxisTap>& rows, const std::vector<AxisTap>& columns,
                             const WeightStrides& w) {
  std::vector<ConvTap> taps;
  taps.reserve(rows.size() * columns.size());
  for (const AxisTap& row : rows)
    for (const AxisTap& column : columns)
      taps.push_back({row.offset, column.offset, row.weight * w.r + column.weight * w.s});
  return taps;
}

}  // namespace

Range valid_range(int64_t count, int64_t step, int64_t offset, int64_t size) {
  if (offset >= size) return {0, 0};
  const int64_t begin = std::min(count, offset >= 0 ? 0 : (-offset - 1) / step + 1);
  const int64_t end = std::min(count, (size - 1 - offset) / step + 1);
  return {begin, std::max(begin, end)};
}

ConvProblem merged(const ConvProblem& p) {
  if (p.groups != 1 || p.flip || (p.layout != p.weight_layout && p.R * p.S > 1)) return p;
  // Whether the taps of an axis lie side by side and reach every position once.
  const auto covered = [](int64_t size, int64_t taps, int64_t outputs, int64_t stride, int64_t pad,
                          int64_t dilation) {
    return pad == 0 && (dilation == 1 || taps == 1) && (stride == taps || outputs == 1) &&
           outputs > 0 && size / outputs == taps && size % outputs == 0;
  };
  const bool rows = covered(p.H, p.R, p.P, p.stride_h, p.pad_top, p.dilation_h);
  const bool columns = covered(p.W, p.S, p.Q, p.stride_w, p.pad_left, p.dilation_w);
  ConvProblem m = p;
  if (rows && columns && p.P == 1 && p.Q == 1) {
    m.C = p.C * p.R * p.S;
    m.H = m.W = m.R = m.S = 1;
    m.layout = m.weight_layout = Layout::kNHWC;
  } else if (columns && p.layout == Layout::kNHWC) {
    m.C = p.C * p.S;
    m.W = p.Q;
    m.S = m.stride_w = 1;
  }
  return m;
}

ConvView fprop_view(const ConvProblem& p) {
  const WeightStrides w = weight_strides(p);
  ConvView view;
  view.N = p.N;
  view.groups = p.groups;
  view.C = p.C / p.groups;
  view.K = p.K / p.groups;
  view.H = p.H;
  view.W = p.W;
  view.I = p.P;
  view.J = p.Q;
  // See fprop_axis; and the step of a single row or column is never taken.
  view.step_h = p.P > 1 ? std::min(p.stride_h, p.H) : 1;
  view.step_w = p.Q > 1 ? std::min(p.stride_w, p.W) : 1;
  view.src = image_strides(p.layout, p.C, p.H, p.W);
  view.dst = image_strides(p.layout, p.pixel_channels > 0 ? p.pixel_channels : p.K, p.P, p.Q);
  view.dst_offset = 0;
  view.weight_group = view.K * w.k;
  view.weight_k = w.k;
  view.weight_c = w.c;
  if (p.N == 0 || p.C == 0) return view;
  view.taps = product(fprop_axis(p.R, p.stride_h, p.pad_top, p.dilation_h, p.flip, p.H, p.P),
                      fprop_axis(p.S, p.stride_w, p.pad_left, p.dilation_w, p.flip, p.W, p.Q), w);
  return view;
}

std::vector<ConvView> dgrad_views(const ConvProblem& p, bool* covers_all) {
  const WeightStrides w = weight_strides(p);
  const std::vector<AxisPhase> rows =
      dgrad_axis(p.R, p.stride_h, p.pad_top, p.dilation_h, p.flip, p.H, p.P);
  const std::vector<AxisPhase> columns =
      dgrad_axis(p.S, p.stride_w, p.pad_left, p.dilation_w, p.flip, p.W, p.Q);
  const ConvStrides image = image_strides(p.layout, p.C, p.H, p.W);
  std::vector<ConvView> views;
  int64_t covered = 0;
  for (const AxisPhase& row : rows) {
    for (const AxisPhase& column : columns) {
      ConvView view;
      view.N = p.N;
      view.groups = p.groups;
      view.C = p.K / p.groups;
      view.K = p.C / p.groups;
      view.H = p.P;
      view.W = p.Q;
      view.I = row.count;
      view.J = column.count;
      view.step_h = view.step_w = 1;
      view.src = image_strides(p.layout, p.K, p.P, p.Q);
      // A stride above the size may be huge: then there is one row or column and no step.
      view.dst = {image.n, image.c, row.count > 1 ? image.row * p.stride_h : 0,
                  column.count > 1 ? image.column * p.stride_w : 0};
      view.dst_offset = row.first * image.row + column.first * image.column;
      view.weight_group = view.C * w.k;
      view.weight_k = w.c;
      view.weight_c = w.k;
      view.taps = product(row.taps, column.taps, w);
      covered += view.pixels();
      views.push_back(std::move(view));
    }
  }
  *covers_all = covered == p.H * p.W;
  return views;
}

ConvView flat_pixels(const ConvView& view) {
  ConvView v = view;
  // A single column has no step.
  if (v.J == 1) v.dst.column = v.dst.row;
  if (v.taps.size() != 1 || v.taps[0].h != 0 || v.taps[0].w != 0 || v.step_h != 1 ||
      v.step_w != 1 || v.H != v.I || v.W != v.J || v.src.row != v.W * v.src.column ||
      v.dst.row != v.J * v.dst.column)
    return view;
  v.W = v.J = v.pixels();
  v.H = v.I = 1;
  v.src.row = v.W * v.src.column;
  v.dst.row = v.J * v.dst.column;
  return v;
}

Range tap_span(const ConvView& view, int64_t ConvTap::* axis) {
  const auto [first, last] =
      std::minmax_element(view.taps.begin(), view.taps.end(),
                          [&](const ConvTap& a, const ConvTap& b) { return a.*axis < b.*axis; });
  return {(*first).*axis, (*last).*axis + 1};
}

}  // namespace torchconv::cpu
