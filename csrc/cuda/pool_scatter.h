// The backward pass of a selection in large windows, where dx is zero almost everywhere: a block
// fills its part of dx with zeros, then writes what was selected there. Every window sums what
// those around it have for the element that it selected, and all that selected it write the same
// sum: no atomics. Bound: bytes written.
//
// A block has some planes or a band of a large one (NCHW), or 128 bytes of channels of a band of an
// image (NHWC).
#pragma once

#include <numeric>

#include "cuda/early_launch.h"
#include "cuda/pool_tiles.h"

namespace torchconv::cuda {

inline constexpr int kScatterThreads = 128;

struct ScatterTasks {
  PoolView<int32_t> v;
  int32_t lanes;        // planes of a block, or channels
  int32_t chunks;       // NHWC: blocks for all channels
  int32_t bands, rows;  // of an image or plane; of a band
  int32_t planes;       // NCHW: of all blocks
  int32_t in_area, out_area;
  int32_t down, right;  // how far apart windows with a common element are at most
  bool vectors;         // NCHW: whether every block's part begins at a vector
  Quotient<int32_t> by_lanes;
};

template <typename T, bool kPlanes>
__global__ void __launch_bounds__(kScatterThreads)
    scatter_windows(ScatterTasks b, const T* __restrict__ dy, SelectedArray selected, T* dx) {
  constexpr int n = kLanes<T>;
  using V = Vector<T, n>;
  begin_early();
  const PoolView<int32_t>& v = b.v;
  const int id = static_cast<int>(threadIdx.x);
  int32_t block = static_cast<int32_t>(blockIdx.x);
  const int32_t c = kPlanes ? 0 : block % b.chunks * b.lanes;
  if constexpr (!kPlanes) block /= b.chunks;
  const int32_t first_row = block % b.bands * b.rows;
  const int32_t end_row = min(first_row + b.rows, v.h.size);
  const int32_t image = block / b.bands;
  const int32_t lanes = kPlanes ? min(b.lanes, b.planes - image * b.lanes) : b.lanes;
  // Of tasks: a plane's windows follow each other, or a window's channels.
  const int32_t first_task =
      kPlanes ? image * b.lanes * b.out_area : image * b.out_area * v.channels + c;
  T* const to = dx + (kPlanes ? image * b.lanes * b.in_area : image * b.in_area * v.channels + c);
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
  struct Fetched {
    T value;
    int64_t selection;
  };
  const auto fetch = [&](int32_t task) {
    int32_t p, q;
    const int32_t lane = locate(task, p, q);
    const int32_t at = first_task + (kPlanes ? task : (p * v.w.out + q) * v.channels + lane);
    return Fetched{dy[at], load_selection(selected, at)};
  };
  // Most threads' only task is under way before the zeros, behind which its numbers would wait.
  Fetched first{};
  if (id < tasks) first = fetch(id);
  if constexpr (kPlanes) {
    // Of a band, one plane.
    const int32_t total = (lanes - 1) * b.in_area + (end_row - first_row) * v.w.size;
    const int32_t whole = b.vectors ? total / n : 0;
    T* const zeros = to + first_row * v.w.size;
    for (int32_t i = id; i < whole; i += kScatterThreads) reinterpret_cast<V*>(zeros)[i] = V{};
    for (int32_t i = whole * n + id; i < total; i += kScatterThreads)
      zeros[i] = from_wide<T>(Wide<T>{0});
  } else {
    const int32_t vectors = lanes / n;  // a power of two
    V* const vector = reinterpret_cast<V*>(to) + id % vectors;
    for (int32_t pixel = first_row * v.w.size + id / vectors; pixel < end_row * v.w.size;
         pixel += kScatterThreads / vectors)
      vector[pixel * (v.channels / n)] = V{};
  }
  for (int32_t task = id; task < tasks; task += kScatterThreads) {
    const Fetched now = task == id ? first : fetch(task);
    int32_t p, q;
    const int32_t lane = locate(task, p, q);
    const int32_t element = selected_element(v, selected.kind, now.selection, p, q);
    const bool own = element >= first_row * v.w.size && element < end_row * v.w.size;
    values[task] = to_wide(now.value);
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
  constexpr int64_t kBytes = 40 * 1024, kLine = 128 / static_cast<int64_t>(sizeof(T));
  int64_t lanes = kLine, chunks = 1, unit = 1;  // rows that a band has a multiple of
  if (planes) {
    const int64_t whole = n / std::gcd(in, int64_t{n});  // planes of whole vectors
    const int64_t most = std::max<int64_t>(kBytes / (in * static_cast<int64_t>(sizeof(T))), 1);
    lanes = std::clamp<int64_t>(
        images / (int64_t{8} * queue.multiprocessors), 1,
        std::min(most, std::max<int64_t>(kScatterThreads / std::max<int64_t>(out, 1), 1)));
    if (most >= whole) lanes = std::max<int64_t>(lanes / whole, 1) * whole;
    unit = n / std::gcd(s.w.size, int64_t{n});
  } else {
    if (s.channels % lanes != 0 || !aligned<T>(dx, n)) return false;
    chunks = s.channels / lanes;
  }
  const int64_t parts = planes ? ceil_div(images, lanes) : images * chunks;
  const int64_t most_bands = lanes > 1 && planes ? 1 : std::max<int64_t>(s.h.size / 4, 1);
  const int64_t wanted =
      std::clamp<int64_t>(ceil_div(int64_t{8} * queue.multiprocessors, parts), 1, most_bands);
  const int64_t rows = ceil_div(ceil_div(s.h.size, wanted), unit) * unit;
  const int64_t bands = ceil_div(s.h.size, rows), blocks = parts * bands;
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
  launch_early(planes ? scatter_windows<T, true> : scatter_windows<T, false>,
               dim3(static_cast<unsigned>(blocks)), dim3(kScatterThreads), static_cast<int>(bytes),
               queue, b, dy, selected, dx);
  return true;
}

}  // namespace torchconv::cuda
