// The windows of adaptive pooling along one axis, and what its kernels share.
//
// The rule is its own inverse: element h is in window i exactly where i is in the window that
// output h would have over P elements. So a backward asks for the windows of H outputs over P
// elements and gathers, and every element of dx is written once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/pool_problem.h"
#include "cpu/adaptive_pool2d.h"
#include "cpu/pool_window.h"

namespace torchconv::cpu {

// The window of each of `out` outputs over `in` elements. in * (out + 1) must fit.
inline std::vector<Range> adaptive_windows(int64_t in, int64_t out) {
  std::vector<Range> windows;
  windows.reserve(static_cast<size_t>(out));
  for (int64_t i = 0; i < out; i++) windows.push_back({i * in / out, ceil_div((i + 1) * in, out)});
  return windows;
}

inline Range at(const std::vector<Range>& windows, int64_t i) {
  return windows[static_cast<size_t>(i)];
}

// Whether i has the window of i - 1, so that its result is a copy.
inline bool repeats(const std::vector<Range>& windows, int64_t i) {
  return i > 0 && at(windows, i).begin == at(windows, i - 1).begin &&
         at(windows, i).end == at(windows, i - 1).end;
}

// The size of the largest window, at most: for how much work an output is.
constexpr int64_t largest_window(int64_t in, int64_t out) { return ceil_div(in, out) + 1; }

constexpr bool is_empty(const AdaptiveProblem& p) {
  return p.N == 0 || p.C == 0 || p.P == 0 || p.Q == 0;
}

// dx of a pooling without outputs; it may have no elements itself, and then no address.
inline void fill_zero(const AdaptiveProblem& p, void* dx) {
  const int64_t size = p.dtype == DType::kFloat64 ? 8 : p.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t bytes = p.N * p.C * p.H * p.W * size;
  if (bytes > 0) std::memset(dx, 0, static_cast<size_t>(bytes));
}

// With one channel both layouts are the same memory: take the better kernel.
constexpr bool runs_channels_last(const AdaptiveProblem& p) {
  return p.layout == Layout::kNHWC && p.C != 1;
}

// Whether ordinary pooling's kernels run where the sizes divide evenly. On planes they take a row's
// elements by strides, output by output, which from stride 3 on costs more than folding the rows of
// a window with vectors first; but a plane with one output they take as a whole.
constexpr bool runs_as_ordinary(const AdaptiveProblem& p) {
  return divides_evenly(p) && (runs_channels_last(p) || p.W / p.Q < 3 || (p.P == 1 && p.Q == 1));
}

// The ordinary pooling of kernel = stride, for sizes that divide evenly.
inline PoolProblem ordinary_pooling(const AdaptiveProblem& p) {
  PoolProblem pool{};
  pool.N = p.N, pool.C = p.C, pool.H = p.H, pool.W = p.W;
  pool.P = p.P, pool.Q = p.Q;
  pool.R = pool.stride_h = p.H / p.P;
  pool.S = pool.stride_w = p.W / p.Q;
  pool.dilation_h = pool.dilation_w = 1;
  pool.dtype = p.dtype;
  pool.layout = p.layout;
  pool.count_include_pad = true;
  return pool;
}

}  // namespace torchconv::cpu
