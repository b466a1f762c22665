// What pooling's kernels ask once a call or once a row, and what does not depend on the element
// type: which taps of a window lie in the image, which outputs an element belongs to, divisors. It
// is apart from the kernels, see pool_window.h.
#include <algorithm>
#include <cmath>

#include "cpu/avg_pool2d.h"
#include "cpu/pool2d_backward_rows.h"
#include "cpu/pool2d_global.h"
#include "cpu/pool2d_large.h"
#include "cpu/pool2d_rules.h"
#include "cpu/pool2d_strided.h"
#include "cpu/pool_padded_rows.h"

namespace torchconv::cpu {

// ---- Windows.

Range Axis::valid_taps(int64_t o) const {
  const int64_t first = start(o);
  if (size <= 0 || first >= size) return {0, 0};
  const int64_t begin = first >= 0 ? 0 : ceil_div(-first, dilation);
  const int64_t end = std::min(taps, (size - 1 - first) / dilation + 1);
  return {std::min(begin, end), end};
}

std::vector<Range> Axis::all_valid_taps() const {
  std::vector<Range> all(static_cast<size_t>(out));
  for (int64_t o = 0; o < out; o++) all[static_cast<size_t>(o)] = valid_taps(o);
  return all;
}

std::vector<int64_t> Axis::outputs_without_taps() const {
  std::vector<int64_t> outputs;
  for (int64_t o = 0; o < out; o++) {
    if (valid_taps(o).empty()) outputs.push_back(o);
  }
  return outputs;
}

Range Axis::interior() const {
  if (size <= 0 || taps - 1 > (size - 1) / dilation) return {0, 0};
  const int64_t last_start = size - 1 - (taps - 1) * dilation;
  const int64_t begin = std::min(ceil_div(pad, stride), out);
  const int64_t end = std::min(floor_div(last_start + pad, stride) + 1, out);
  return {begin, std::max(begin, end)};
}

int64_t Axis::span() const {
  if (size <= 0) return 0;
  return taps - 1 > (size - 1) / dilation ? size : (taps - 1) * dilation + 1;
}

int64_t RowRing::slots_to_keep(int64_t span, int64_t step, int64_t row_bytes) {
  int64_t slots = 1;
  while (slots < span) slots *= 2;
  return step < span && slots <= kMaxBytes / std::max<int64_t>(row_bytes, 1) ? slots : 0;
}

RowRing::RowRing(int64_t slots) : rows_(static_cast<size_t>(slots), -1) {}

void RowRing::clear() { std::fill(rows_.begin(), rows_.end(), -1); }

RowReach::RowReach(const Axis& axis, int lanes) {
  for (int64_t q = 0; q < axis.out; q++) {
    const Range valid = axis.valid_taps(q);
    if (valid.empty()) continue;
    taps = {taps.empty() ? valid.begin : std::min(taps.begin, valid.begin),
            std::max(taps.end, valid.end)};
  }
  if (taps.empty()) return;
  origin = axis.start(0) + taps.begin * axis.dilation;
  // Vectors of outputs are whole where they are loaded from the image, two elements a lane for
  // stride 2.
  const int64_t outputs = axis.stride <= 2 ? round_up(axis.out, lanes) : axis.out;
  length = outputs * axis.stride + (taps.size() - 1) * axis.dilation;
  const int64_t last = axis.start(axis.out - 1) + (taps.end - 1) * axis.dilation;
  inside = origin >= 0 && last < axis.size;
  regular = length - std::min<int64_t>(origin, 0) <= 4 * axis.size + kMargin;
}

// ---- Windows folded in two levels.

namespace {

// Channels at once: all, or whole vectors of them.
int64_t chunk(const PoolProblem& p, int64_t lanes) {
  const int64_t most = 4 * lanes;
  if (!runs_channels_last(p)) return 1;
  if (p.C <= most) return p.C;
  return round_up(ceil_div(p.C, ceil_div(p.C, most)), lanes);
}

// Output columns at once: some 2048 elements of an output row. Neighbouring strips both fold the
// S - 1 columns that they share.
int64_t strip(const PoolProblem& p, int64_t lanes) {
  if (!runs_channels_last(p)) return p.Q;
  const int64_t most = std::max((1 << 11) / chunk(p, lanes), 2 * p.S);
  return ceil_div(p.Q, ceil_div(p.Q, most));
}

bool has_elements(const Axis& axis, int64_t o) { return !axis.valid_taps(o).empty(); }

double taps_of_all(const Axis& axis) {
  double taps = 0;
  for (int64_t o = 0; o < axis.out; o++) taps += static_cast<double>(axis.valid_taps(o).size());
  return taps;
}

// On pixels, in folds of one vector. What preparing a padded element costs, a step of a level, and
// the positions, are fitted to windows of 7 x 7 to 13 x 13 on a Zen 4. A bad estimate costs time
// alone.
bool two_levels_are_cheaper(const PoolProblem& p, const Axis& vertical, const Axis& horizontal,
                            bool codes) {
  constexpr double kElement = 4.3, kStep = 0.5, kCodes = 2.2;
  const double rows = static_cast<double>((p.P - 1) * p.stride_h + p.R);
  const double columns = static_cast<double>(p.Q - 1 + p.S), P = static_cast<double>(p.P),
               Q = static_cast<double>(p.Q);
  const double across = rows * Q * 2 * std::sqrt(static_cast<double>(p.S));
  const double down = P * Q * 2 * std::sqrt(static_cast<double>(p.R));
  const double levels = kElement * rows * columns + kStep * (across + down);
  return levels * (codes ? kCodes : 1) < taps_of_all(vertical) * taps_of_all(horizontal);
}

// On planes, whose rows the other kernels fold once for all windows in them, only windows of about
// 24 x 24 and larger, and several of them in each direction, gain by two levels.
bool planes_are_large(const PoolProblem& p) {
  constexpr int64_t kWindow = 48, kImage = 48, kOutputs = 4;
  return p.R + p.S >= kWindow && std::min(p.H, p.W) >= kImage && std::min(p.P, p.Q) >= kOutputs;
}

}  // namespace

bool LargeWindows::applies(const PoolProblem& p, int lanes, bool codes) {
  constexpr int64_t kMaxRow = 1 << 14;  // elements
  if (p.stride_w != 1 || p.dilation_h != 1 || p.dilation_w != 1) return false;
  if (p.R < 4 || p.S < 4 || p.stride_h > p.R / 2 || p.R > p.H || p.S > p.W) return false;
  if (p.H * p.W > INT32_MAX / 4 || (strip(p, lanes) + p.S) * chunk(p, lanes) > kMaxRow)
    return false;
  const Axis vertical = vertical_axis(p), horizontal = horizontal_axis(p);
  return has_elements(vertical, 0) && has_elements(vertical, p.P - 1) &&
         has_elements(horizontal, 0) && has_elements(horizontal, p.Q - 1) &&
         (runs_channels_last(p) ? two_levels_are_cheaper(p, vertical, horizontal, codes)
                                : planes_are_large(p));
}

LargeWindows::LargeWindows(const PoolProblem& p, int lanes)
    : pixel_(runs_channels_last(p) ? p.C : 1),
      chunk_(chunk(p, lanes)),
      chunks_(ceil_div(pixel_, chunk_)),
      strip_(strip(p, lanes)),
      strips_(ceil_div(p.Q, strip_)),
      row_((strip_ + p.S - 1) * chunk_ + lanes),
      across_(p.S),
      down_(p.R) {}

int64_t LargeWindows::power_of_two(int64_t at_least) {
  int64_t power = 1;
  while (power < at_least) power *= 2;
  return power;
}

LargeWindows::Levels::Levels(int64_t n) {
  while ((run + 1) * (run + 1) <= n) run++;
  runs = n / run;
  rest = n % run;
}

// ---- Windows of strides above 2.

StridedColumns::StridedColumns(const PoolProblem& p, const RowReach& reach, int lanes)
    : origin(reach.origin),
      length((p.Q - 1) * p.stride_w + (reach.taps.size() - 1) * p.dilation_w + 1),
      line(p.Q + (reach.taps.size() - 1) * p.dilation_w / p.stride_w + lanes),
      first_tap(reach.taps.begin) {
  std::vector<int64_t> index(static_cast<size_t>(std::min(p.stride_w, length)), -1);
  for (int64_t t = 0; t < reach.taps.size(); t++) {
    const int64_t from = t * p.dilation_w % p.stride_w, shift = t * p.dilation_w / p.stride_w;
    int64_t& i = index[static_cast<size_t>(from)];
    if (i < 0) {
      i = static_cast<int64_t>(phases.size());
      phases.push_back({from, 0});
    }
    phases[static_cast<size_t>(i)].count = p.Q + shift;
    taps.push_back(i * line + shift);
  }
}

// ---- One window.

bool is_global(const PoolProblem& p, int lanes) {
  return p.P == 1 && p.Q == 1 && p.dilation_h == 1 && p.dilation_w == 1 &&
         p.H * p.W <= INT32_MAX - 2 * lanes && has_elements(vertical_axis(p), 0) &&
         has_elements(horizontal_axis(p), 0);
}

// ---- Results.

int64_t vertical_factor(const PoolProblem& p, const Axis& axis, int64_t o) {
  const Range taps = axis.valid_taps(o);
  if (p.divisor != 0 || taps.empty()) return 1;
  if (!p.count_include_pad) return taps.size();
  return std::min(axis.taps, axis.size + axis.pad - axis.start(o));
}

int64_t horizontal_factor(const PoolProblem& p, const Axis& axis, int64_t o) {
  if (p.divisor != 0 && !axis.valid_taps(o).empty()) return p.divisor;
  return vertical_factor(p, axis, o);
}

std::vector<int64_t> vertical_factors(const PoolProblem& p, const Axis& axis) {
  std::vector<int64_t> factors(static_cast<size_t>(axis.out));
  for (int64_t o = 0; o < axis.out; o++)
    factors[static_cast<size_t>(o)] = vertical_factor(p, axis, o);
  return factors;
}

int64_t index_from_offset(const PoolProblem& p, int64_t offset, int64_t out_p, int64_t out_q) {
  if (offset < 0) return offset;
  const int64_t h = out_p * p.stride_h - p.pad_h + offset / p.S * p.dilation_h;
  const int64_t w = out_q * p.stride_w - p.pad_w + offset % p.S * p.dilation_w;
  return h * p.W + w;
}

// ---- Backward.

namespace {

// The outputs that element receives from, of the outputs [first, first + count).
void append_contributions(const Axis& axis, int64_t element, int64_t first, int64_t count,
                          std::vector<Contribution>* list) {
  if (count <= 0) return;
  const int64_t position = element + axis.pad;
  const int64_t last = first + count - 1;
  int64_t tap = floor_div(position - first * axis.stride, axis.dilation);
  tap = std::min(tap, axis.taps - 1);
  if (tap >= count) {  // a huge window: fewer outputs than taps
    for (int64_t output = first; output <= last; output++) {
      const int64_t distance = position - output * axis.stride;
      if (distance < 0) break;
      if (distance % axis.dilation != 0 || distance / axis.dilation >= axis.taps) continue;
      list->push_back({distance / axis.dilation, output});
    }
    return;
  }
  for (; tap >= 0; tap--) {
    const int64_t distance = position - tap * axis.dilation;
    const int64_t output = floor_div(distance, axis.stride);
    if (output > last) break;
    if (output * axis.stride == distance) list->push_back({tap, output});
  }
}

}  // namespace

int64_t outputs_spanned(const Axis& axis) {
  if (axis.taps - 1 > axis.out * axis.stride / axis.dilation) return axis.out;
  return std::min(axis.out, (axis.taps - 1) * axis.dilation / axis.stride + 1);
}

Contributions::Contributions(const Axis& axis) {
  first_.reserve(static_cast<size_t>(axis.size) + 1);
  first_.push_back(0);
  for (int64_t e = 0; e < axis.size; e++) {
    append_contributions(axis, e, 0, axis.out, &list_);
    first_.push_back(list_.size());
  }
}

Phases::Phases(const Axis& axis) : columns(ceil_div(axis.size, axis.stride)) {
  const int64_t count = std::min(axis.stride, axis.size);
  for (int64_t phase = 0; phase < count; phase++) {
    // A shift matters where i + shift is an output for some i.
    first.push_back(taps.size());
    append_contributions(axis, phase, 1 - columns, columns - 1 + axis.out, &taps);
  }
  first.push_back(taps.size());
  for (const Contribution& t : taps) {
    left = std::max(left, -t.output);
    right = std::max(right, columns + t.output - axis.out);
  }
}

bool writes_past_cache(const PoolProblem& p, int64_t element_size) {
  return p.N * p.C * p.H * p.W >= kStreamedBytes / element_size;
}

RowGeometry::RowGeometry(const PoolProblem& p, int64_t element_size)
    : vertical(vertical_axis(p)),
      horizontal(horizontal_axis(p)),
      channels(runs_channels_last(p) ? p.C : 1),
      planes(p.N * p.C / channels),
      in_row(p.W * channels),
      out_row(p.Q * channels),
      windows(vertical),
      phases(horizontal),
      left(phases.left * channels),
      streams(writes_past_cache(p, element_size)) {}

}  // namespace torchconv::cpu
