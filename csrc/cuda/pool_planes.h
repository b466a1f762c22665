// Global pooling, where the only window covers its plane: in NCHW planes are read and written as
// one run of memory in 16-byte vectors, whatever their size. Bound: bytes moved.
//
// Forward: a block copies some planes to shared memory, and a few threads fold each plane from
// there, in turns; their number follows from the plane's size alone. Backward: a thread writes one
// vector of dx, which spans two planes at most. Of averages in NHWC, a thread reads or writes one
// vector of channels of every few pixels.
#pragma once

#include "cuda/plane_runs.cuh"
#include "cuda/pool_geometry.h"
#include "cuda/pool_rules.h"

namespace torchconv::cuda {

inline bool covers_image(const PoolShape& s) {
  const auto covers = [](const PoolAxis& a) {
    return a.out == 1 && a.dilation == 1 && a.taps >= a.size + a.pad;
  };
  return !s.adaptive && covers(s.h) && covers(s.w);
}
inline bool covers_plane(const PoolShape& s) { return s.channels == 1 && covers_image(s); }

// The code of element `position` of a plane.
__device__ __forceinline__ uint32_t plane_code(const PoolView<int32_t>& v, uint32_t position) {
  const uint32_t width = static_cast<uint32_t>(v.w.size);
  const uint32_t h = position / width, w = position - h * width;
  return (h + static_cast<uint32_t>(v.h.pad)) * static_cast<uint32_t>(v.row_codes) + w +
         static_cast<uint32_t>(v.w.pad);
}

template <typename Rule>
__global__ void __launch_bounds__(kPoolThreads)
    fold_planes(PoolView<int32_t> v, Rule rule, typename Rule::Value divisor, int32_t area,
                int sharers, bool vectors, bool waits, const typename Rule::Element* __restrict__ x,
                typename Rule::Element* __restrict__ y, SelectedOutput selected) {
  using T = typename Rule::Element;
  using State = typename Rule::State;
  constexpr int n = kLanes<T>;
  T* copy = dynamic_shared<T>();
  const int id = static_cast<int>(threadIdx.x), planes = kPoolThreads / sharers;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * planes;
  const int32_t rest = v.threads - first;
  const int32_t count = (rest < planes ? rest : planes) * area;
  const T* const from = x + first * area;
  if (!waits) {
    load_run(copy, from, count);
    copy_async_commit();
    copy_async_wait<0>();
    copy += lead_of(from);
  } else {
    const int32_t whole = vectors ? count / n : 0;
#pragma unroll 4
    for (int32_t i = id; i < whole; i += kPoolThreads)
      reinterpret_cast<Vector<T, n>*>(copy)[i] = reinterpret_cast<const Vector<T, n>*>(from)[i];
#pragma unroll 4
    for (int32_t i = whole * n + id; i < count; i += kPoolThreads) copy[i] = from[i];
  }
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
  y[plane] = rule.finish(state, Division<typename Rule::Value>(divisor));
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
  const bool waits = queue.capability < 80;  // no asynchronous copies
  const int sharers = area <= 64 ? (sizeof(T) == 8 ? 4 : 2) : area <= 256 ? 8 : 32;
  const int64_t block = kPoolThreads / sharers;
  const PoolView<int32_t> view(s, planes, 1, true);
  using Value = typename Rule::Value;
  const Value divisor = Rule::kSelects ? Value{1} : view.template divisor_of<Value>(0, 0);
  // Without asynchronous copies a run begins where shared memory does.
  const int64_t elements = waits ? block * area : run_elements<T>(1, 1, block, area);
  launch(fold_planes<Rule>, dim3(static_cast<unsigned>(ceil_div(planes, block))),
         dim3(kPoolThreads), static_cast<int>(elements * static_cast<int64_t>(sizeof(T))), queue,
         view, rule, divisor, static_cast<int32_t>(area), sharers, aligned<T>(x, kLanes<T>), waits,
         x, y, selected);
  return true;
}

// dy of each plane at the element that was selected, or over the divisor at every one.
template <typename T, bool kSelects>
__global__ void __launch_bounds__(kPoolThreads)
    spread_planes(PoolView<int32_t> v, Quotient<int32_t> by_area, Wide<T> divisor, int32_t area,
                  int32_t total, bool vectors, const T* __restrict__ dy, SelectedArray selected,
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
  const Division<Wide<T>> over(divisor);
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
  const PoolView<int32_t> view(s, planes, 1, true);
  const auto divisor = kSelects ? Wide<T>{1} : view.template divisor_of<Wide<T>>(0, 0);
  launch(spread_planes<T, kSelects>, pool_grid(ceil_div(total, n)), dim3(kPoolThreads), 0, queue,
         view, Quotient<int32_t>(area), divisor, static_cast<int32_t>(area),
         static_cast<int32_t>(total), aligned<T>(dx, n), dy, selected, dx);
  return true;
}

inline constexpr int kChannelSplits = 8, kChannelVectors = kPoolThreads / kChannelSplits;

// The average, NHWC: kChannelSplits threads share the pixels of a vector in turns, and one thread
// for each channel sums their parts.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads, 4)
    average_channels(Quotient<int32_t> by_vectors, float divisor, int32_t threads, int32_t vectors,
                     int32_t area, const T* __restrict__ x, T* __restrict__ y) {
  constexpr int n = kLanes<T>, kBatch = 8;  // loads under way
  using V = Pack<T>;
  __shared__ Vector<float, 4> parts[kChannelSplits][kChannelVectors * n / 4];
  const int id = static_cast<int>(threadIdx.x);
  const int split = id / kChannelVectors, own = id % kChannelVectors;
  const int32_t first = static_cast<int32_t>(blockIdx.x) * kChannelVectors;
  float total[n] = {};
  if (first + own < threads) {
    int32_t image = first + own;
    const int32_t vector = by_vectors.split(image);
    const V* const from = reinterpret_cast<const V*>(x) + image * area * vectors + vector;
    for (int32_t begin = split; begin < area; begin += kBatch * kChannelSplits) {
      V batch[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
        const int32_t pixel = begin + k * kChannelSplits;
        batch[k] = V{};
        if (pixel < area) batch[k] = from[pixel * vectors];
      }
#pragma unroll
      for (int k = 0; k < kBatch; k++) {
#pragma unroll
        for (int i = 0; i < n; i++) total[i] += batch[k].at(i);
      }
    }
  }
  store_all<float, n>(parts[split][own * n / 4].element, [&](int i) { return total[i]; });
  __syncthreads();
  if (id >= kChannelVectors * n || first * n + id >= threads * n) return;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kChannelSplits; k++) sum += parts[k][id / 4].element[id % 4];
  y[first * n + id] = from_wide<T>(Division<float>(divisor)(sum));
}

// Runs average_channels where it takes the problem, and says whether.
template <typename T>
bool run_average_channels(const PoolShape& s, int64_t images, const T* x, T* y,
                          const Queue& queue) {
  constexpr int n = kLanes<T>;
  const int64_t area = s.h.size * s.w.size, vectors = s.channels / n;
  if (s.channels % n != 0 || !covers_image(s) || area < 24 || area > 256 || !aligned<T>(x, n))
    return false;
  const int64_t threads = images * vectors;
  launch(average_channels<T>, dim3(static_cast<unsigned>(ceil_div(threads, kChannelVectors))),
         dim3(kPoolThreads), 0, queue, Quotient<int32_t>(vectors),
         PoolView<int32_t>(s, images, 1, true).template divisor_of<float>(0, 0),
         static_cast<int32_t>(threads), static_cast<int32_t>(vectors), static_cast<int32_t>(area),
         x, y);
  return true;
}

// The average's gradient, NHWC: a thread has n channels of an image, at every `splits`th pixel.
template <typename T>
__global__ void __launch_bounds__(kPoolThreads)
    spread_channels(Quotient<int32_t> by_vectors, Quotient<int32_t> by_splits, Wide<T> divisor,
                    int32_t threads, int32_t vectors, int32_t splits, int32_t area,
                    const T* __restrict__ dy, T* __restrict__ dx) {
  constexpr int n = kLanes<T>;
  using V = Vector<T, n>;
  int32_t image = pool_thread<int32_t>();
  if (image >= threads) return;
  const int32_t vector = by_vectors.split(image), split = by_splits.split(image);
  const Division<Wide<T>> over(divisor);
  V value = reinterpret_cast<const V*>(dy)[image * vectors + vector];
#pragma unroll
  for (int i = 0; i < n; i++) value.element[i] = from_wide<T>(over(to_wide(value.element[i])));
  V* const to = reinterpret_cast<V*>(dx) + image * area * vectors + vector;
#pragma unroll 4
  for (int32_t i = split; i < area; i += splits) to[i * vectors] = value;
}

// Runs spread_channels where it takes the problem, of aligned vectors, and says whether.
template <typename T>
bool run_spread_channels(const PoolShape& s, int64_t images, const T* dy, T* dx,
                         const Queue& queue) {
  if (!covers_image(s)) return false;
  const int64_t area = s.h.size * s.w.size, vectors = s.channels / kLanes<T>;
  const int64_t splits = ceil_div(area, 8), threads = images * vectors * splits;
  launch(spread_channels<T>, pool_grid(threads), dim3(kPoolThreads), 0, queue,
         Quotient<int32_t>(vectors), Quotient<int32_t>(splits),
         PoolView<int32_t>(s, images, 1, true).template divisor_of<Wide<T>>(0, 0),
         static_cast<int32_t>(threads), static_cast<int32_t>(vectors), static_cast<int32_t>(splits),
         static_cast<int32_t>(area), dy, dx);
  return true;
}

}  // namespace torchconv::cuda
