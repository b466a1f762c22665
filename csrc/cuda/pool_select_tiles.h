// Maxima and minima of large windows over small planes (NCHW): a block copies some whole planes to
// shared memory, takes the extreme value of each row of x across the taps of every column of
// outputs, and then finds in which row, and there in which column, a window has its extreme first
// (of NaN, last). So values alone are compared but for one row of each window. Bound: bytes moved.
#pragma once

#include "cuda/plane_runs.cuh"
#include "cuda/pool_tiles.h"

namespace torchconv::cuda {

inline constexpr int kSelectThreads = 128;

// The greater one, or NaN.
template <typename V>
__device__ __forceinline__ V greater_or_nan(V a, V b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<V, float>) {
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
    return a;
  }
#endif
  return b > a || b != b ? b : a;
}

template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    select_tiles(PlaneTiles b, Selection<T> rule, const T* __restrict__ x, T* __restrict__ y,
                 SelectedOutput selected) {
  using V = Wide<T>;
  const PoolView<int32_t>& v = b.v;
  auto* const rows = reinterpret_cast<TileWindow*>(dynamic_shared<unsigned char>());
  TileWindow* const columns = rows + v.h.out;
  // Of each row and column of outputs; then the planes.
  auto* const folded = reinterpret_cast<T*>(columns + v.w.out);
  const int32_t folded_count =
      (b.group * v.h.size * v.w.out + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int id = static_cast<int>(threadIdx.x);
  const int32_t first = b.first(), planes = b.count();
  const T* const from = x + first * b.in_area;
  load_run(folded + folded_count, from, planes * b.in_area);
  copy_async_commit();
  const T* const copy = folded + folded_count + lead_of(from);
  for (int32_t i = id; i < v.h.out; i += kSelectThreads) rows[i] = TileWindow::of(v, v.h, i);
  for (int32_t i = id; i < v.w.out; i += kSelectThreads) columns[i] = TileWindow::of(v, v.w, i);
  copy_async_wait<0>();
  __syncthreads();

  for (int32_t task = id; task < planes * v.h.size * v.w.out; task += kSelectThreads) {
    int32_t row = task;
    const int32_t q = v.w.by_out.split(row);
    const int32_t begin = columns[q].element, count = columns[q].count;
    const T* element = copy + row * v.w.size + begin;
    V best = Selection<T>::none();
#pragma unroll 4
    for (int32_t s = 0; s < count; s++)
      best = greater_or_nan(best, rule.prepare(element[s * v.w.dilation]));
    folded[task] = from_wide<T>(best);
  }
  __syncthreads();

  for (int32_t task = id; task < planes * b.out_area; task += kSelectThreads) {
    int32_t plane = task;
    const int32_t q = v.w.by_out.split(plane), p = v.h.by_out.split(plane);
    const TileWindow row = rows[p], column = columns[q];
    const int32_t position = first * b.out_area + task;
    uint32_t code = ~uint32_t{0};
    V value = Selection<T>::none();
    if (row.count > 0 && column.count > 0) {
      const int32_t top = plane * v.h.size + row.element;
      // A candidate replaces what is less, or NaN replaces all: the first of equals, the last NaN.
      const auto find = [&](int32_t count, auto&& candidate) {
        V best = candidate(0);
        int32_t at = 0;
#pragma unroll 4
        for (int32_t i = 1; i < count; i++) {
          const V next = candidate(i);
          const bool better = next > best || next != next;
          best = better ? next : best;
          at = better ? i : at;
        }
        return at;
      };
      const int32_t r = find(row.count, [&](int32_t i) {
        return to_wide(folded[(top + i * v.h.dilation) * v.w.out + q]);
      });
      const T* const elements = copy + (top + r * v.h.dilation) * v.w.size + column.element;
      const int32_t s =
          find(column.count, [&](int32_t i) { return rule.prepare(elements[i * v.w.dilation]); });
      value = rule.prepare(elements[s * v.w.dilation]);
      code = static_cast<uint32_t>((row.tap + r) * v.row_codes + column.tap + s);
    }
    y[position] = from_wide<T>(rule.mirror(value));
    if (selected.data == nullptr) continue;
    store_codes<1>(
        selected, position, [&](int) { return code; },
        [&](int) { return v.index_of(code, static_cast<uint32_t>(v.row_codes), p, q); });
  }
}

// Runs select_tiles where it takes the problem, and says whether.
template <typename T>
bool run_select_tiles(const PoolShape& s, int64_t planes, const Selection<T>& rule, const T* x,
                      T* y, const SelectedOutput& selected, const Queue& queue) {
  constexpr int64_t kSize = sizeof(T), kBytes = 12 * 1024;
  const int64_t in = s.h.size * s.w.size, out = s.h.out * s.w.out;
  if (s.channels != 1 || in < 16 * out || s.h.out == 0 || queue.capability < 80) return false;
  PlaneTiles b = plane_tiles<T>(s, planes, x, queue);
  const int64_t group = std::clamp<int64_t>(kBytes / (in * kSize), 1, planes);
  b.group = static_cast<int32_t>(group);
  const int64_t bytes = (s.h.out + s.w.out) * static_cast<int64_t>(sizeof(TileWindow)) +
                        round_up(group * s.h.size * s.w.out, kLanes<T>) * kSize +
                        run_elements<T>(1, 1, group, in) * kSize;
  if (bytes > kMostTileBytes) return false;
  launch(select_tiles<T>, tile_grid(b), dim3(kSelectThreads), static_cast<int>(bytes), queue, b,
         rule, x, y, selected);
  return true;
}

}  // namespace torchconv::cuda
