// Average pooling in NCHW by strips of plane_runs.cuh, where rows of a plane are not whole vectors:
// 3x3 windows one element apart, and 2x2 ones that are disjoint.
//
// A thread folds each row of its strip's windows once and keeps the rows that the next output needs
// again. Bound: bytes moved.
#pragma once

#include "cuda/plane_runs.cuh"
#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

struct PoolStrips {
  Gather g;
  PlaneRuns t;
  int64_t planes;
  int in_elements;  // of shared memory for the input's run
  float divisor;    // of every average; 0 where taps inside the image count
};

// A block's planes or band, and where a thread's strip begins in it.
struct StripTask {
  int64_t plane0;
  int planes, slot, first_row, column;

  __device__ __forceinline__ StripTask(const PoolStrips& p, uint32_t block, int columns)
      : plane0(static_cast<int64_t>(block) * p.t.slots),
        planes(static_cast<int>(min(static_cast<int64_t>(p.t.slots), p.planes - plane0))) {
    uint32_t rest = threadIdx.x;
    column = min(static_cast<int>(p.t.strips.split(rest)) * columns, p.g.w.out - columns);
    first_row = static_cast<int>(p.t.sets.split(rest)) * p.t.set_rows;
    slot = static_cast<int>(rest);
  }
};

template <typename S>
__global__ void __launch_bounds__(kStripThreads, 4)
    average_strips(const __grid_constant__ PoolStrips p, const typename S::T* x, typename S::T* y) {
  using T = typename S::T;
  using A = Wide<T>;
  constexpr int R = S::R, kStride = S::kStride, kColumns = S::kColumns, kKept = R - kStride;
  constexpr int kStore = S::kStore;
  const Gather& g = p.g;
  T* inputs = dynamic_shared<T>();
  T* outputs = inputs + p.in_elements;
  uint32_t block = blockIdx.x;
  const PlaneRun run = run_of<S>(g, p.t, static_cast<int>(p.t.bands.split(block)));
  const StripTask task(p, block, kColumns);
  const int in_plane = g.h.in * g.w.in, out_plane = g.h.out * g.w.out;
  const T* from = x + task.plane0 * in_plane + static_cast<int64_t>(run.h_first) * g.w.in;
  load_run(inputs, from, (task.planes - 1) * in_plane + run.in_rows * g.w.in);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  T* const target = y + task.plane0 * out_plane + static_cast<int64_t>(run.row0) * g.w.out;
  const int rows = min(p.t.set_rows, run.rows - task.first_row);
  if (task.slot < task.planes && rows > 0) {
    const int w0 = task.column * kStride + g.w.origin;
    const uint32_t inside = S::inside(w0, g.w.in);
    int h = (run.row0 + task.first_row) * kStride + g.h.origin;
    const T* window =
        inputs + lead_of(from) + task.slot * in_plane + (h - run.h_first) * g.w.in + w0;
    T* out =
        outputs + lead_of(target) + task.slot * out_plane + task.first_row * g.w.out + task.column;

    A kept[R][kColumns];
    const auto fold = [&](A(&row)[kColumns]) {
      A value[S::kWindow];
      S::load(window, static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in), inside, value);
      window += g.w.in, ++h;
#pragma unroll
      for (int b = 0; b < kColumns; ++b) {
        row[b] = value[b * kStride];
#pragma unroll
        for (int s = 1; s < R; ++s) row[b] += value[b * kStride + s];
      }
    };
#pragma unroll
    for (int r = 0; r < kKept; ++r) fold(kept[r]);
    // Of the first, the last and the other windows of a row; windows hold at most one column of
    // padding.
    const int first_taps = R - (w0 < 0), last_taps = R - (w0 + S::kWindow > g.w.in);
    const auto divisions = [&](int taps) {
      const auto of = [&](int columns) {
        return Division<A>(p.divisor != 0 ? p.divisor : static_cast<A>(taps * columns));
      };
      struct {
        Division<A> first, other, last;
      } all{of(first_taps), of(R), of(last_taps)};
      return all;
    };
    int taps = 0;
    auto over = divisions(R);
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
#pragma unroll
      for (int r = 0; r < kStride; ++r) fold(kept[kKept + r]);
      const int now = R - (h - R < 0) - (h > g.h.in);
      if (now != taps) taps = now, over = divisions(taps);
      A average[kColumns];
#pragma unroll
      for (int b = 0; b < kColumns; ++b) {
        A total = kept[0][b];
#pragma unroll
        for (int r = 1; r < R; ++r) total += kept[r][b];
        average[b] = (b == 0 ? over.first : b == kColumns - 1 ? over.last : over.other)(total);
      }
#pragma unroll
      for (int b = 0; b < kColumns; b += kStore) {
        Vector<T, kStore> rounded;
#pragma unroll
        for (int v = 0; v < kStore; ++v) rounded.element[v] = from_wide<T>(average[b + v]);
        *reinterpret_cast<Vector<T, kStore>*>(out + b) = rounded;
      }
      out += g.w.out;
#pragma unroll
      for (int r = 0; r < kKept; ++r)
#pragma unroll
        for (int b = 0; b < kColumns; ++b) kept[r][b] = kept[r + kStride][b];
    }
  }
  __syncthreads();
  store_run(outputs, target, (task.planes - 1) * out_plane + run.rows * g.w.out);
}

// False where a row is too long.
template <typename S>
bool launch_average_strips(PoolStrips p, const typename S::T* x, typename S::T* y,
                           const Queue& queue) {
  using T = typename S::T;
  constexpr int64_t kSize = sizeof(T);
  if (!strips_take<S>(p.g) || !plane_runs<S>(p.g, kSize, kSize, p.t)) return false;
  const int64_t slots = p.t.slots;
  const int64_t in_rows = std::min<int64_t>((p.t.band_rows - 1) * S::kStride + S::R, p.g.h.in);
  p.planes = p.g.N;
  p.in_elements = static_cast<int>(run_elements<T>(slots, p.g.h.in, in_rows, p.g.w.in));
  const int64_t outputs = run_elements<T>(slots, p.g.h.out, p.t.band_rows, p.g.w.out);
  launch(average_strips<S>,
         dim3(static_cast<unsigned>(ceil_div(p.planes, slots) * p.t.bands.value())),
         dim3(static_cast<unsigned>(p.t.threads)),
         static_cast<int>((p.in_elements + outputs) * kSize), queue, p, x, y);
  return true;
}

// Whether averages of s are over `taps` x `taps` windows, `stride` apart, none of which reaches
// beyond the padding.
inline bool square_windows(const PoolShape& s, int64_t taps, int64_t stride) {
  const auto is = [&](const PoolAxis& a) {
    return a.taps == taps && a.stride == stride && a.dilation == 1 && a.pad <= (taps - 1) / 2 &&
           a.size > 0 && a.out > 0 && (a.out - 1) * stride + taps <= a.size + 2 * a.pad;
  };
  return s.channels == 1 && !s.adaptive && is(s.h) && is(s.w);
}

inline PoolStrips pool_strips(const PoolShape& s, int64_t images) {
  const auto axis = [](const PoolAxis& a) {
    GatherAxis result{};
    result.in = static_cast<int>(a.size), result.out = static_cast<int>(a.out);
    result.origin = static_cast<int>(-a.pad), result.unit = Divisor(1);
    return result;
  };
  PoolStrips p{};
  p.g.h = axis(s.h), p.g.w = axis(s.w);
  p.g.N = images, p.g.groups = p.g.in_channels = p.g.out_channels = 1;
  p.divisor = s.divisor != 0  ? static_cast<float>(s.divisor)
              : s.include_pad ? static_cast<float>(s.h.taps * s.w.taps)
                              : 0.0f;
  return p;
}

// Runs average_strips where it takes the problem, and says whether.
template <typename T>
bool run_average_strips(const PoolShape& s, int64_t images, const T* x, T* y, const Queue& queue) {
  // Pairs of the half types: longer strips.
  constexpr bool kPairs = sizeof(T) == 2;
  constexpr int kColumns = kPairs ? 14 : 7;
  if (queue.capability < 80 || (kPairs && (!aligned<T>(x, 2) || !aligned<T>(y, 2)))) return false;
  // Whole vectors go without shared memory.
  if (s.w.size % kLanes<T> == 0 && s.w.out % kLanes<T> == 0) return false;
  const PoolStrips p = pool_strips(s, images);
  if (square_windows(s, 3, 1) && s.w.pad == 1 && s.w.out % kColumns == 0) {
    using S = Strip<T, 3, kColumns, kPairs>;
    return launch_average_strips<S>(p, x, y, queue);
  }
  if (square_windows(s, 2, 2) && s.w.out % 7 == 0) {
    using S = Strip<T, 2, 7, kPairs, 2>;
    return launch_average_strips<S>(p, x, y, queue);
  }
  return false;
}

}  // namespace torchconv::cuda
