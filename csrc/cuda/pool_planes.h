// Global pooling in NCHW, where the only window covers its plane: planes are read and written as
// one run of memory in 16-byte vectors, whatever their size. Bound: bytes moved.
//
// Forward: a block copies some planes to shared memory, and a few threads fold each plane from
// there, in turns; their number follows from the plane's size alone. Backward: a thread writes one
// vector of dx, which spans two planes at most.
#pragma once

#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

inline bool covers_plane(const PoolShape& s) {
  const auto covers = [](const PoolAxis& a) {
    return a.out == 1 && a.dilation == 1 && a.taps >= a.size + a.pad;
  };
  return s.channels == 1 && !s.adaptive && covers(s.h) && covers(s.w);
}

// The code of element `position` of a plane.
__device__ __forceinline__ uint32_t plane_code(const PoolView<int32_t>& v, uint32_t position) {
  const uint32_t width = static_cast<uint32_t>(v.w.size);
  const uint32_t h = position / width, w = position - h * width;
  return (h + static_cast<uint32_t>(v.h.pad)) * static_cast<uint32_t>(v.row_codes) + w +
         static_cast<uint32_t>(v.w.pad);
}

template <typename Rule>
__global__ void __launch_bounds__(kPoolThreads)
    fold_planes(PoolView<int32_t> v, Rule rule, int32_t area, int sharers, bool vectors,
                const typename Rule::Element* __restrict__ x,
                typename Rule::Element* __restrict__ y, SelectedOutput selected) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  constexpr int n = kLanes<T>;
  T* const copy = dynamic_shared<T>();
  const int id = static_cast<int>(threadIdx.x), planes = kPoolThreads / sharers;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * planes;
  const int32_t rest = v.threads - first;
  const int32_t count = (rest < planes ? rest : planes) * area;
  const T* const from = x + first * area;
  const int32_t whole = vectors ? count / n : 0;
#pragma unroll 4
  for (int32_t i = id; i < whole; i += kPoolThreads)
    reinterpret_cast<Vector<T, n>*>(copy)[i] = reinterpret_cast<const Vector<T, n>*>(from)[i];
#pragma unroll 4
  for (int32_t i = whole * n + id; i < count; i += kPoolThreads) copy[i] = from[i];
  __syncthreads();

  const int own = id / sharers, turn = id % sharers;
  const bool works = own < rest;
  State state = Rule::start(0);
  if (works) {
#pragma unroll 4
    for (int32_t i = turn; i < area; i += sharers)
      Rule::fold(state, rule.prepare(copy[own * area + i]), static_cast<uint32_t>(i));
  }
  for (int half = sharers / 2; half > 0; half /= 2) {
    State other = state;
    if constexpr (Rule::kSelects) {
      other.value = __shfl_down_sync(0xffffffffu, state.value, half);
      other.code = __shfl_down_sync(0xffffffffu, state.code, half);
    } else {
      other.sum = __shfl_down_sync(0xffffffffu, state.sum, half);
    }
    Rule::merge(state, other);
  }
  if (!works || turn > 0) return;
  const int32_t plane = first + own;
  using Value = typename Rule::Value;
  y[plane] = rule.finish(
      state, Division<Value>(Rule::kSelects ? Value{1} : v.template divisor_of<Value>(0, 0)));
  if constexpr (Rule::kSelects) {
    if (selected.data == nullptr) return;
    store_codes<1>(
        selected, plane, [&](int) { return plane_code(v, state.code); },
        [&](int) { return static_cast<int64_t>(state.code); });
  }
}

// Runs fold_planes where it takes the problem, and says whether.
template <typename Rule>
bool run_fold_planes(const PoolShape& s, int64_t planes, const Rule& rule,
                     const typename Rule::Element* x, typename Rule::Element* y,
                     const SelectedOutput& selected, const Queue& queue) {
  using T = typename Rule::Element;
  constexpr int64_t kMost = 1024;
  const int64_t area = s.h.size * s.w.size;
  if (!covers_plane(s) || area > kMost) return false;
  const int sharers = area <= 64 ? 4 : area <= 256 ? 8 : 32;
  const int64_t block = kPoolThreads / sharers;
  launch(fold_planes<Rule>, dim3(static_cast<unsigned>(ceil_div(planes, block))),
         dim3(kPoolThreads), static_cast<int>(block * area * static_cast<int64_t>(sizeof(T))),
         queue, PoolView<int32_t>(s, planes, 1, true), rule, static_cast<int32_t>(area), sharers,
         aligned<T>(x, kLanes<T>), x, y, selected);
  return true;
}

// dy of each plane at the element that was selected, or over the divisor at every one.
template <typename T, bool kSelects>
__global__ void __launch_bounds__(kPoolThreads)
    spread_planes(PoolView<int32_t> v, Quotient<int32_t> by_area, int32_t area, int32_t total,
                  bool vectors, const T* __restrict__ dy, SelectedArray selected,
                  T* __restrict__ dx) {
  constexpr int n = kLanes<T>;
  const int32_t begin = pool_thread<int32_t>() * n;
  if (begin >= total) return;
  const int32_t plane = by_area.of(begin), position = begin - plane * area;
  // The first plane's value and where it stands, counted from the vector, and the next plane's.
  Wide<T> value[2];
  int32_t at[2] = {-1, -1};
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const bool exists = k == 0 || (plane + 1) * area < total;
    const int32_t from = exists ? plane + k : plane;
    value[k] = to_wide(dy[from]);
    if constexpr (kSelects) {
      int64_t index = -1;
      if (selected.kind == Selected::kIndex64) {
        index = static_cast<const int64_t*>(selected.data)[from];
      } else {
        const uint32_t code = load_code(selected, from), width = v.row_codes;
        const int64_t h = static_cast<int64_t>(code / width) - v.h.pad;
        const int64_t w = static_cast<int64_t>(code % width) - v.w.pad;
        if (h >= 0 && w >= 0 && w < v.w.size) index = h * v.w.size + w;
      }
      if (index >= 0 && index < area) at[k] = static_cast<int32_t>(index) + k * area - position;
      value[k] += Wide<T>{0};  // a sum of one term, and so never minus zero
    }
  }
  const Division<Wide<T>> over(kSelects ? Wide<T>{1} : v.template divisor_of<Wide<T>>(0, 0));
  if constexpr (!kSelects) value[0] = over(value[0]), value[1] = over(value[1]);
  const auto element = [&](int i) {
    const bool next = position + i >= area;
    const Wide<T> v = next ? value[1] : value[0];
    return from_wide<T>(!kSelects || i == (next ? at[1] : at[0]) ? v : Wide<T>{0});
  };
  if (vectors && begin + n <= total) {
    store_all<T, n>(dx + begin, element);
  } else {
#pragma unroll
    for (int i = 0; i < n; i++)
      if (begin + i < total) dx[begin + i] = element(i);
  }
}

// Runs spread_planes where it takes the problem, and says whether.
template <typename T, bool kSelects>
bool run_spread_planes(const PoolShape& s, int64_t planes, const T* dy,
                       const SelectedArray& selected, T* dx, const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t area = s.h.size * s.w.size, total = planes * area;
  if (!covers_plane(s) || area < n) return false;
  launch(spread_planes<T, kSelects>, pool_grid(ceil_div(total, n)), dim3(kPoolThreads), 0, queue,
         PoolView<int32_t>(s, planes, 1, true), Quotient<int32_t>(area), static_cast<int32_t>(area),
         static_cast<int32_t>(total), aligned<T>(dx, n), dy, selected, dx);
  return true;
}

}  // namespace torchconv::cuda
