// fprop and dgrad as one computation, the gather that simt_gather_kernel.h and simt_direct.cu run:
//
//   target[n, m, i, j] = sum over channels c and taps (t, u) of
//       w[m, c, t, u] * source[n, c, i*step_h + row(t), j*step_w + column(u)]
//
// with source zero outside H x W. fprop is one such problem; dgrad is one for each residue (a, b)
// of (h, w) modulo the stride, a phase, over the taps of that residue with step 1: no product with
// a structural zero is formed (Dumoulin and Visin, A guide to convolution arithmetic, 2016, section
// 4). The taps of a phase are an arithmetic progression in the kernel and in the source.
#pragma once

#include <algorithm>
#include <numeric>

#include "core/conv_problem.h"

namespace torchconv::cuda {

// One residue of one axis.
struct SimtPhase {
  int taps;
  int source, source_step;  // what tap t adds to a position in the source: source + t*source_step
  int weight, weight_step;  // its position in the kernel
  int grid;                 // positions of the target
  int target;               // the first of them
};

struct SimtAxis {
  static constexpr int kPhases = 16;
  SimtPhase phase[kPhases];
  int phases;
  int most_grid;  // of a phase
  int step;       // in the source, from one position of the target to the next
  int target_step;
  int size;  // of the source
};

// In elements.
struct SimtStrides {
  int64_t n, c, row, column;
};

inline SimtStrides image_strides(Layout layout, int64_t C, int64_t H, int64_t W) {
  return layout == Layout::kNCHW ? SimtStrides{C * H * W, H * W, W, 1}
                                 : SimtStrides{C * H * W, 1, W * C, C};
}

struct SimtWeightStrides {
  int64_t k, c, r, s;
};

inline SimtWeightStrides weight_strides(const ConvProblem& p) {
  const int64_t C = p.C / p.groups;
  return p.weight_layout == Layout::kNCHW ? SimtWeightStrides{C * p.R * p.S, p.R * p.S, p.S, 1}
                                          : SimtWeightStrides{C * p.R * p.S, 1, p.S * C, C};
}

struct SimtView {
  int64_t N, groups;
  int64_t C, M;  // channels of source and target in a group
  SimtAxis rows, columns;
  SimtStrides source, target;
  int64_t weight_group, weight_m, weight_c, weight_row, weight_column;  // strides in elements
};

// Coordinates stay far enough from the ends of an int that sums of a few do not wrap.
inline constexpr int64_t kSimtLimit = int64_t{1} << 29;

// Whether the positions of an axis fit, and its phases.
inline bool simt_axis_fits(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                           int64_t dilation) {
  const int64_t span =
      (outputs > 1 ? (outputs - 1) * stride : 0) + (taps > 1 ? (taps - 1) * dilation : 0);
  return size < kSimtLimit && span < kSimtLimit && pad < kSimtLimit && pad > -kSimtLimit;
}

inline bool simt_fits(const ConvProblem& p) {
  return simt_axis_fits(p.H, p.P, p.R, p.stride_h, p.pad_top, p.dilation_h) &&
         simt_axis_fits(p.W, p.Q, p.S, p.stride_w, p.pad_left, p.dilation_w) &&
         std::max(p.C, p.K) / p.groups < kSimtLimit / (p.R * p.S);
}

inline SimtAxis fprop_axis(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                           int64_t dilation, bool flip) {
  SimtAxis axis{};
  const int last = static_cast<int>(taps) - 1;
  axis.phase[0] = {last + 1,
                   static_cast<int>(-pad),
                   last > 0 ? static_cast<int>(dilation) : 0,
                   flip ? last : 0,
                   flip ? -1 : 1,
                   static_cast<int>(outputs),
                   0};
  axis.phases = 1;
  axis.most_grid = static_cast<int>(outputs);
  axis.step = outputs > 1 ? static_cast<int>(stride) : 0;
  axis.target_step = 1;
  axis.size = static_cast<int>(size);
  return axis;
}

// Residues first, first + 1, ... modulo the stride, as many as an axis has room for. Needs stride <
// kSimtLimit.
inline SimtAxis dgrad_axis(int64_t size, int64_t outputs, int64_t taps, int64_t stride, int64_t pad,
                           int64_t dilation, bool flip, int64_t first) {
  SimtAxis axis{};
  const int64_t common = std::gcd(dilation, stride);
  const int64_t every = stride / common;  // a residue has one tap of so many neighbours
  const int64_t end = std::min({first + SimtAxis::kPhases, stride, size});
  for (int64_t a = first; a < end; ++a) {
    // Position a is output p through tap r where a + pad = p*stride + r*dilation.
    int64_t r = 0;
    while (r < std::min(every, taps) && (a + pad - r * dilation) % stride != 0) ++r;
    const bool none = r >= std::min(every, taps);
    const int64_t count = none ? 0 : (taps - 1 - r) / every + 1;
    const auto in_kernel = [&](int64_t tap) { return flip ? taps - 1 - tap : tap; };
    axis.phase[axis.phases++] = {static_cast<int>(count),
                                 static_cast<int>(none ? 0 : (a + pad - r * dilation) / stride),
                                 static_cast<int>(count > 1 ? -(dilation / common) : 0),
                                 static_cast<int>(none ? 0 : in_kernel(r)),
                                 static_cast<int>(flip ? -every : every),
                                 static_cast<int>((size - 1 - a) / stride + 1),
                                 static_cast<int>(a)};
  }
  axis.most_grid = static_cast<int>((size - 1 - first) / stride + 1);
  axis.step = 1;
  axis.target_step = static_cast<int>(stride);
  axis.size = static_cast<int>(outputs);
  return axis;
}

inline SimtView fprop_view(const ConvProblem& p) {
  const SimtWeightStrides w = weight_strides(p);
  SimtView v{};
  v.N = p.N, v.groups = p.groups, v.C = p.C / p.groups, v.M = p.K / p.groups;
  v.rows = fprop_axis(p.H, p.P, p.R, p.stride_h, p.pad_top, p.dilation_h, p.flip);
  v.columns = fprop_axis(p.W, p.Q, p.S, p.stride_w, p.pad_left, p.dilation_w, p.flip);
  v.source = image_strides(p.layout, p.C, p.H, p.W);
  v.target = image_strides(p.layout, p.K, p.P, p.Q);
  v.weight_group = v.M * w.k, v.weight_m = w.k, v.weight_c = w.c;
  v.weight_row = w.r, v.weight_column = w.s;
  return v;
}

// The phases from (first_row, first_column) on.
inline SimtView dgrad_view(const ConvProblem& p, int64_t first_row, int64_t first_column) {
  const SimtWeightStrides w = weight_strides(p);
  SimtView v{};
  v.N = p.N, v.groups = p.groups, v.C = p.K / p.groups, v.M = p.C / p.groups;
  v.rows = dgrad_axis(p.H, p.P, p.R, p.stride_h, p.pad_top, p.dilation_h, p.flip, first_row);
  v.columns = dgrad_axis(p.W, p.Q, p.S, p.stride_w, p.pad_left, p.dilation_w, p.flip, first_column);
  v.source = image_strides(p.layout, p.K, p.P, p.Q);
  v.target = image_strides(p.layout, p.C, p.H, p.W);
  v.weight_group = v.C * w.k, v.weight_m = w.c, v.weight_c = w.k;
  v.weight_row = w.r, v.weight_column = w.s;
  return v;
}

}  // namespace torchconv::cuda
