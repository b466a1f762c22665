// Tiles of NCHW planes in shared memory, for gathers and for their weight gradients.
//
// A block works on a tile of output pixels of one plane, or, where planes are small, of several
// planes at once, its slots. The tile's window of the input lies in shared memory, converted, with
// zeros for the padding. Lanes lie along a row, and a thread has kRows x kColumns pixels.
#pragma once

#include <algorithm>

#include "cuda/gather.h"
#include "cuda/packed.h"

namespace torchconv::cuda {

struct PlaneTiling {
  Divisor h_tiles, w_tiles, row_sets;   // tiles of the image; sets of kRows rows in a tile
  Divisor lanes, slots;                 // threads along a row; planes of a block
  int tile_h, tile_w, window_h, pitch;  // outputs of a tile; its window in shared memory
  int vector;                           // elements of one load, a power of two
  Divisor vectors, window_rows;         // loads of a window's row, rows
  int threads;

  __host__ __device__ int window_elements() const {
    return static_cast<int>(slots.value()) * window_h * pitch;
  }
};

// Tiles for at most kThreads threads. planes: how many there are to fill slots from; filters: sums
// that a thread keeps per pixel, whose weights share the memory.
template <typename T, typename Tap, int kRows, int kColumns, int kThreads>
PlaneTiling plane_tiling(const Gather& g, const void* in, int64_t planes, int filters) {
  constexpr int64_t kMostBytes = 46 * 1024;
  PlaneTiling t{};
  t.vector = 1;
  for (const int vector : {2, kLanes<T>})
    if (g.w.in % vector == 0 && aligned<T>(in, vector) && (sizeof(T) == 2 || vector == kLanes<T>))
      t.vector = vector;
  const auto window = [](const GatherAxis& axis, int64_t tile) {
    return Tap::kSpread    ? tile / 2 + Tap::window(2) - 1
           : Tap::kDilated ? tile + 2 * static_cast<int64_t>(axis.unit.value())
                           : Tap::window(1) + (tile - 1) * Tap::kStride;
  };
  const int64_t row_sets = ceil_div(g.h.out, kRows), columns = ceil_div(g.w.out, kColumns);
  int64_t lanes = ceil_div(columns, ceil_div(columns, 64));
  int64_t sets = ceil_div(row_sets, ceil_div(row_sets, std::max<int64_t>(kThreads / lanes, 1)));
  const int64_t tiles = ceil_div(row_sets, sets) * ceil_div(columns, lanes);
  // Several planes a block where they are small, but not so many that multiprocessors idle.
  int64_t slots = std::max<int64_t>(kThreads / (lanes * sets), 1);
  slots = std::max<int64_t>(std::min(slots, planes * tiles / 512), 1);
  const auto bytes = [&] {
    t.window_h = static_cast<int>(window(g.h, sets * kRows));
    t.pitch = static_cast<int>(
        round_up(window(g.w, lanes * kColumns) + t.vector - 1, std::max(t.vector, 4)));
    return slots * (t.window_h * t.pitch + Tap::R * Tap::R * filters) *
           static_cast<int64_t>(sizeof(Wide<T>));
  };
  while (bytes() > kMostBytes) {
    int64_t& largest = slots > 1 ? slots : sets > 1 ? sets : lanes;
    largest = ceil_div(largest, 2);
  }
  t.tile_h = static_cast<int>(sets * kRows), t.tile_w = static_cast<int>(lanes * kColumns);
  t.h_tiles = Divisor(ceil_div(row_sets, sets)), t.w_tiles = Divisor(ceil_div(columns, lanes));
  t.row_sets = Divisor(sets), t.lanes = Divisor(lanes), t.slots = Divisor(slots);
  t.vectors = Divisor(t.pitch / t.vector), t.window_rows = Divisor(t.window_h);
  t.threads = static_cast<int>(round_up(lanes * sets * slots, 32));
  return t;
}

template <typename T, int kVector, typename PlaneOf>
__device__ __forceinline__ void load_window_by(const PlaneTiling& t, const Gather& g,
                                               PlaneOf plane_of, int h0, int w0, Wide<T>* window) {
  using A = Wide<T>;
  // Loads that a thread has under way before it stores the first.
  constexpr int kBatch = kVector * sizeof(T) == 16 ? 2 : 4;
  const int loads = static_cast<int>(t.slots.value() * t.window_rows.value() * t.vectors.value());
  const int threads = static_cast<int>(blockDim.x);
  for (int i = static_cast<int>(threadIdx.x); i < loads; i += kBatch * threads) {
    Packed<T, kVector> loaded[kBatch];
    int target[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      uint32_t rest = static_cast<uint32_t>(i + k * threads);
      const int column = static_cast<int>(t.vectors.split(rest)) * kVector, w = w0 + column;
      target[k] = static_cast<int>(rest) * t.pitch + column;  // in the lines of all windows
      const int h = h0 + static_cast<int>(t.window_rows.split(rest));
      loaded[k] = {};
      if (i + k * threads < loads && static_cast<unsigned>(h) < static_cast<unsigned>(g.h.in) &&
          static_cast<unsigned>(w) < static_cast<unsigned>(g.w.in)) {
        const T* plane = plane_of(rest);
        if (plane != nullptr)
          loaded[k] = *reinterpret_cast<const Packed<T, kVector>*>(
              plane + static_cast<int64_t>(h) * g.w.in + w);
      }
    }
    constexpr int kStore = kVector < kLanes<A> ? kVector : kLanes<A>;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (i + k * threads >= loads) break;
#pragma unroll
      for (int v = 0; v < kVector; v += kStore) {
        Vector<A, kStore> wide;
#pragma unroll
        for (int u = 0; u < kStore; ++u) wide.element[u] = loaded[k].wide(v + u);
        *reinterpret_cast<Vector<A, kStore>*>(window + target[k] + v) = wide;
      }
    }
  }
}

// The windows of all slots, which begin at row h0 and column w0, a multiple of t.vector.
// plane_of(slot) is null where a slot has no plane.
template <typename T, typename PlaneOf>
__device__ __forceinline__ void load_windows(const PlaneTiling& t, const Gather& g,
                                             PlaneOf plane_of, int h0, int w0, Wide<T>* window) {
  if (t.vector == kLanes<T>)
    load_window_by<T, kLanes<T>>(t, g, plane_of, h0, w0, window);
  else if (sizeof(T) == 2 && t.vector == 2)
    load_window_by<T, 2>(t, g, plane_of, h0, w0, window);
  else
    load_window_by<T, 1>(t, g, plane_of, h0, w0, window);
}

// Whole planes that follow each other in memory, as one run of vectors whatever their width.
struct PlaneRun {
  Divisor plane, width;  // elements of a plane, of a row
};

// As many elements as a thread loads at once: more would meet in the same banks of shared memory.
template <typename T>
inline constexpr int kRunVector = kLanes<T> < 4 ? kLanes<T> : 4;

// The windows of slots whose planes begin at `in`, of which there are `planes`; every window holds
// its whole plane. All threads call it.
template <typename T>
__device__ __forceinline__ void load_planes(const PlaneTiling& t, const Gather& g,
                                            const PlaneRun& run, const T* in, int planes, int h0,
                                            int w0, Wide<T>* windows) {
  using A = Wide<T>;
  constexpr int kVector = kRunVector<T>, kBatch = 2;
  const int elements = planes * static_cast<int>(run.plane.value());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  bool cleared = false;
  for (int first = 0; first < elements || !cleared; first += kBatch * threads * kVector) {
    Packed<T, kVector> loaded[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int at = first + (k * threads + thread) * kVector;
      if (at + kVector <= elements) {
        loaded[k] = *reinterpret_cast<const Packed<T, kVector>*>(in + at);
      } else {
        Vector<T, kVector> rest{};
#pragma unroll
        for (int v = 0; v < kVector; ++v)
          if (at + v < elements) rest.element[v] = in[at + v];
        memcpy(&loaded[k], &rest, sizeof(rest));
      }
    }
    if (!cleared) {
      for (int i = thread * kLanes<A>; i < t.window_elements(); i += threads * kLanes<A>)
        *reinterpret_cast<Vector<A, kLanes<A>>*>(windows + i) = {};
      __syncthreads();
      cleared = true;
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int at = first + (k * threads + thread) * kVector;
      if (at >= elements) break;
      uint32_t slot = static_cast<uint32_t>(at), row = run.plane.split(slot);
      int column = static_cast<int>(run.width.split(row));
      A* target = windows +
                  (static_cast<int>(slot) * t.window_h + static_cast<int>(row) - h0) * t.pitch +
                  column - w0;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        if (at + v < elements) *target = loaded[k].wide(v);
        ++target;
        if (++column == g.w.in) {
          column = 0, target += t.pitch - g.w.in;
          if (++row == static_cast<uint32_t>(g.h.in))
            row = 0, target += (t.window_h - g.h.in) * t.pitch;
        }
      }
    }
  }
}

}  // namespace torchconv::cuda
