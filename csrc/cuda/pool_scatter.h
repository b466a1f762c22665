// The backward pass of a selection in large windows, where dx is zero almost everywhere: a block
// fills its part of dx with zeros, then writes what was selected there. Every window sums what
// those around it have for the element that it selected, and all that selected it write the same
// sum: no atomics. Bound: bytes written.
//
// A block has some planes (NCHW), or 128 bytes of channels of a band of an image (NHWC).
#pragma once

#include <numeric>

#include "cuda/pool_tiles.h"

namespace torchconv::cuda {

inline constexpr int kScatterThreads = 128;

struct ScatterTasks {
  PoolView<int32_t> v;
  int32_t lanes;        // planes of a block, or channels
  int32_t chunks;       // NHWC: blocks for all channels
  int32_t bands, rows;  // NHWC: of an image; of a band
  int32_t planes;       // NCHW: of all blocks
  int32_t in_area, out_area;
  int32_t down, right;  // how far apart windows with a common element are at most
  bool vectors;         // NCHW: whether every block's planes begin at a vector
  Quotient<int32_t> by_lanes;
};

template <typename T, bool kPlanes>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_windows(ScatterTasks b, const T* __restrict__ dy, SelectedArray selected, T* dx) {
  constexpr int n = kLanes<T>;
  using V = Vector<T, n>;
  const PoolView<int32_t>& v = b.v;
  const int id = static_cast<int>(threadIdx.x);
  int32_t block = static_cast<int32_t>(blockIdx.x);
  // Of tasks: a plane's windows follow each other, or a window's channels.
  int32_t lanes = b.lanes, first_task, first_row = 0, end_row = v.h.size;
  T* to;
  if constexpr (kPlanes) {
    const int32_t plane = block * b.lanes;
    lanes = min(lanes, b.planes - plane);
    first_task = plane * b.out_area;
    to = dx + plane * b.in_area;
    const int32_t total = lanes * b.in_area, whole = b.vectors ? total / n : 0;
    for (int32_t i = id; i < whole; i += kScatterThreads) reinterpret_cast<V*>(to)[i] = V{};
    for (int32_t i = whole * n + id; i < total; i += kScatterThreads)
      to[i] = from_wide<T>(Wide<T>{0});
  } else {
    const int32_t c = block % b.chunks * b.lanes;
    block /= b.chunks;
    first_row = block % b.bands * b.rows, end_row = min(first_row + b.rows, v.h.size);
    const int32_t image = block / b.bands;
    first_task = image * b.out_area * v.channels + c;
    to = dx + image * b.in_area * v.channels + c;
    const int32_t vectors = lanes / n;  // a power of two
    V* const vector = reinterpret_cast<V*>(to) + id % vectors;
    for (int32_t pixel = first_row * v.w.size + id / vectors; pixel < end_row * v.w.size;
         pixel += kScatterThreads / vectors)
      vector[pixel * (v.channels / n)] = V{};
  }
  const int32_t tasks = b.out_area * lanes;
  auto* const values = reinterpret_cast<Wide<T>*>(dynamic_shared<unsigned char>());
  auto* const targets = reinterpret_cast<int32_t*>(values + b.out_area * b.lanes);
  // A task's plane or channel, and its window.
  const auto locate = [&](int32_t task, int32_t& p, int32_t& q) {
    int32_t lane = 0;
    if constexpr (!kPlanes) lane = b.by_lanes.split(task);
    q = v.w.by_out.split(task), p = v.h.by_out.split(task);
    return kPlanes ? task : lane;
  };
  for (int32_t task = id; task < tasks; task += kScatterThreads) {
    int32_t p, q;
    const int32_t lane = locate(task, p, q);
    const int32_t at = first_task + (kPlanes ? task : (p * v.w.out + q) * v.channels + lane);
    values[task] = to_wide(dy[at]);
    const int32_t element = selected_element(v, selected, at, p, q);
    const bool own = element >= first_row * v.w.size && element < end_row * v.w.size;
    targets[task] = !own ? -1 : kPlanes ? lane * b.in_area + element : element * v.channels + lane;
  }
  __syncthreads();
  const int32_t step = kPlanes ? 1 : lanes;  // to the next window
  for (int32_t task = id; task < tasks; task += kScatterThreads) {
    const int32_t target = targets[task];
    if (target < 0) continue;
    int32_t p, q;
    locate(task, p, q);
    Wide<T> sum = 0;
    for (int32_t down = -b.down; down <= b.down; down++) {
      if (static_cast<uint32_t>(p + down) >= static_cast<uint32_t>(v.h.out)) continue;
      for (int32_t right = -b.right; right <= b.right; right++) {
        if (static_cast<uint32_t>(q + right) >= static_cast<uint32_t>(v.w.out)) continue;
        const int32_t other = task + (down * v.w.out + right) * step;
        if (targets[other] == target) sum += values[other];
      }
    }
    to[target] = from_wide<T>(sum);
  }
}

// Runs scatter_windows where it takes the problem, and says whether.
template <typename T>
bool run_scatter_windows(const PoolShape& s, int64_t images, const T* dy,
                         const SelectedArray& selected, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t in = s.h.size * s.w.size, out = s.h.out * s.w.out;
  const bool planes = s.channels == 1;
  const int64_t down = windows_apart(s, s.h), right = windows_apart(s, s.w);
  if (in < 16 * out || (2 * down + 1) * (2 * right + 1) > 49) return false;
  constexpr int64_t kBytes = 12 * 1024, kLine = 128 / static_cast<int64_t>(sizeof(T));
  int64_t lanes = kLine, chunks = 1, bands = 1, blocks;
  if (planes) {
    const int64_t unit = n / std::gcd(in, int64_t{n});  // planes of whole vectors
    lanes = std::max<int64_t>(kBytes / (in * static_cast<int64_t>(sizeof(T))), 1);
    if (lanes >= unit) lanes = lanes / unit * unit;
    blocks = ceil_div(images, lanes);
  } else {
    if (s.channels % lanes != 0 || !aligned<T>(dx, n)) return false;
    chunks = s.channels / lanes;
    bands = std::clamp<int64_t>(ceil_div(int64_t{8} * queue.multiprocessors, images * chunks), 1,
                                std::max<int64_t>(s.h.size / 4, 1));
    blocks = images * chunks * bands;
  }
  const int64_t rows = ceil_div(s.h.size, bands);
  const int64_t bytes = lanes * out * (static_cast<int64_t>(sizeof(Wide<T>)) + 4);
  if (bytes > kMostTileBytes) return false;
  const ScatterTasks b{PoolView<int32_t>(s, images, 1, true),
                       static_cast<int32_t>(lanes),
                       static_cast<int32_t>(chunks),
                       static_cast<int32_t>(bands),
                       static_cast<int32_t>(rows),
                       static_cast<int32_t>(images),
                       static_cast<int32_t>(in),
                       static_cast<int32_t>(out),
                       static_cast<int32_t>(down),
                       static_cast<int32_t>(right),
                       planes && lanes * in % n == 0 && aligned<T>(dx, n),
                       Quotient<int32_t>(lanes)};
  launch(planes ? scatter_windows<T, true> : scatter_windows<T, false>,
         dim3(static_cast<unsigned>(blocks)), dim3(kScatterThreads), static_cast<int>(bytes), queue,
         b, dy, selected, dx);
  return true;
}

}  // namespace torchconv::cuda
